"""Malformed files of rows."""

import gzip
import json
import os
from functools import partial
from random import Random

from case import PAIR, Case, Place

_GOOD = json.dumps(PAIR)
_ROW = _GOOD.encode() + b"\n"


def _file(name: str, content: bytes | str, place: Place, rng: Random) -> list[str]:
    path = place / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return ["data", str(path)]


def _all_bad(line: str | bytes, place: Place, rng: Random) -> list[str]:
    return ["data", str(place.rows(*[line] * rng.randint(1, 20)))]


def _special(name: str, make, place: Place, rng: Random) -> list[str]:
    make(place / name)
    return ["data", str(place / name)]


def _long_line(megabytes: int, name: str, place: Place, rng: Random) -> list[str]:
    row = json.dumps(PAIR | {"chosen": "w1 " * (megabytes * 10**6 // 3)})
    return _file(name, f"[{row}]" if name.endswith(".json") else row, place, rng)


def _blank(name: str, start: bytes, blank: bytes, place: Place, rng: Random) -> list[str]:
    return _file(name, start + blank * 10**8, place, rng)


def _bomb(block: bytes, place: Place, rng: Random) -> list[str]:
    """Expands to two gigabytes."""
    path = place / "rows.jsonl.gz"
    packed = gzip.compress(block, compresslevel=9)
    with path.open("wb") as file:  # a file of several members is one of gzip too
        for _ in range(2**31 // len(block) + 1):
            file.write(packed)
    return ["data", str(path)]


def _cases() -> list[Case]:
    deep, wide = "[" * 50_000 + "]" * 50_000, "[" * 300 + "]" * 300
    cases = [
        Case(f"rows: every line is {name}", partial(_all_bad, line), says)
        for name, line, says in (
            ("half a row", _GOOD[:-7], "not valid JSON"),
            ("text", "hello", "not valid JSON"),
            ("a number", "17", "not a JSON object"),
            ("null", "null", "not a JSON object"),
            ("without text", '{"prompt": []}', "rows|known"),
            ("an empty object", "{}", "columns|known"),
            ("Python", "{'prompt': 'a', 'chosen': 'b'}", "not valid JSON"),
            ("a key twice", '{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}', "occurs twice"),
            ("nested deeply", '{"prompt": ' + deep + "}", "nested|recursion"),
            ("nested", '{"prompt": "a", "chosen": "b", "rejected": ' + wide + "}", "nested"),
            ("not UTF-8", b'{"prompt": "\xff"}', "not valid UTF-8"),
            ("a number of 5,000 digits", '{"prompt": ' + "9" * 5000 + "}", "digits"),
            ("of other columns", json.dumps({"question": "a", "\x1b[31mred": "b"}), "none of its columns"),
        )
    ]
    kinds = {"a number": 5, "true": True, "an object": {"a": 1}, "a list of numbers": [1]}
    for column in ("prompt", "chosen", "rejected"):
        for kind, value in (kinds | ({} if column == "prompt" else {"empty": "", "blank": " \t"})).items():
            line = json.dumps(PAIR | {column: value})
            cases.append(Case(f"rows: {column} is {kind}", partial(_all_bad, line), f"{column}|column"))
    for name, file, content, says in (
        ("an empty file", "rows.jsonl", "", "no rows"),
        ("blank lines", "rows.jsonl", "\n \n\t\n", "no rows"),
        ("an empty array", "rows.json", "[]", "no rows"),
        ("half an array", "rows.json", f"[{_GOOD},", "not a JSON array"),
        ("an array without commas", "rows.json", f"[{_GOOD} {_GOOD}]", "not a JSON array"),
        ("an array and more", "rows.json", f"[{_GOOD}\n]\n{_GOOD}", "not a JSON array"),
        ("an array nested deeply", "rows.json", deep, "nested|recursion"),
        ("UTF-16", "rows.jsonl", _GOOD.encode("utf-16"), "UTF-16"),
        ("zeros", "rows.jsonl", b"\0" * 10_000, "not valid JSON"),
        ("gzip under a plain name", "rows.jsonl", gzip.compress(_GOOD.encode()), "UTF-8|not valid JSON"),
        ("plain text as gzip", "rows.jsonl.gz", _GOOD, "cannot be read to the end"),
        ("half a gzip", "rows.jsonl.gz", gzip.compress(_GOOD.encode() * 99)[:-12], "cannot be read to the end"),
        ("a pickle", "rows.pkl", b"cos\nsystem\n(S'exit'\ntR.", "pickles are never loaded"),
        ("another suffix", "rows.xlsx", "PK", "cannot read .xlsx"),
        ("an empty table", "rows.csv", "", "no rows"),
        ("a table without rows", "rows.csv", "prompt,chosen,rejected\n", "no rows"),
        ("a table of numbers", "rows.csv", "1,2,3\n4,5,6\n", "header"),
        ("a column twice", "rows.csv", "prompt,prompt\na,b\n", "several columns"),
        ("semicolons", "rows.csv", "prompt;chosen;rejected\na;b;c\n", "separated by commas"),
        ("too few values", "rows.csv", "prompt,chosen,rejected\na,b\n", "another number of values"),
        ("a table that is not UTF-8", "rows.csv", b"prompt,chosen,rejected\n\xe9,b,c\n", "not UTF-8"),
        ("no Parquet", "rows.parquet", "PAR1 hello PAR1", "not a readable Parquet file"),
        ("an empty Parquet", "rows.parquet", "", "not a readable Parquet file"),
        ("no Arrow", "rows.arrow", b"ARROW1" + b"\0" * 50, "not a readable Arrow file"),
        ("an empty Arrow", "rows.arrow", "", "not a readable Arrow file"),
        ("a name that acts", "\x1b[31mred\x1b[0m\u202e.jsonl", "{", "not valid JSON"),
    ):
        cases.append(Case(f"rows: {name}", partial(_file, file, content), says))
    for kind, make in (
        ("a named pipe", os.mkfifo),
        ("an endless device", lambda path: path.symlink_to("/dev/zero")),
        ("a dangling link", lambda path: path.symlink_to("nothing")),
    ):
        for name in ("rows.jsonl", "rows.csv.gz", "rows.parquet"):
            cases.append(Case(f"rows: {name} is {kind}", partial(_special, name, make), "found|no such", heavy=True))
    cases += [
        Case("rows: one line of 20 MB", partial(_long_line, 20, "rows.jsonl"), "longer than", heavy=True),
        Case("rows: an array with a row of 20 MB", partial(_long_line, 20, "rows.json"), "longer than", heavy=True),
        Case("rows: 100 MB of blank lines", partial(_blank, "rows.jsonl", b"", b"\n"), "blank lines", heavy=True),
        Case("rows: 100 MB of blanks", partial(_blank, "rows.json", b"[", b" "), "blank lines", heavy=True),
        Case("rows: a gzip bomb of zeros", partial(_bomb, b"\0" * 2**22), "bomb", heavy=True),
        Case("rows: a gzip bomb of blank lines", partial(_bomb, b"\n" * 2**22), "bomb", heavy=True),
        Case("rows: a gzip bomb of good rows", partial(_bomb, _ROW * (2**22 // len(_ROW))), "bomb", heavy=True),
    ]
    return cases


CASES = _cases()
