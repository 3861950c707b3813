import gzip
import json

import pytest

from qstar_jax.data.reading import read_rows
from qstar_jax.errors import InputError

ROWS = [{"prompt": "p1", "chosen": "é"}, {"prompt": "p2", "chosen": "b"}, {"prompt": "p3", "chosen": "c"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def failure(source, split="train", limit=None):
    with pytest.raises(InputError) as caught:
        read_rows(str(source), split, limit)
    return str(caught.value)


def test_each_line_is_a_row(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "Why?", "chosen": "Because."}\n{"prompt": "How?", "chosen": "So."}\n'
    )
    assert read_rows(str(tmp_path / "pairs.jsonl"), split="train") == [
        {"prompt": "Why?", "chosen": "Because."},
        {"prompt": "How?", "chosen": "So."},
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
def test_reads_json_lines_in_order(tmp_path, name):
    (tmp_path / name).write_text(LINES, encoding="utf-8")
    assert read_rows(str(tmp_path / name), "train") == ROWS
    assert read_rows(str(tmp_path / name), "train", limit=2) == ROWS[:2]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_reads_gzip(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES.encode()))
    assert read_rows(str(tmp_path / name), "train") == ROWS


def test_reads_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"chosen": [{"role": "assistant", "content": str(i)}]} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    assert read_rows(str(tmp_path / "a.parquet"), "train") == rows
    assert read_rows(str(tmp_path / "a.parquet"), "train", limit=3) == rows[:3]


def test_blank_lines_and_byte_order_marks_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert read_rows(str(tmp_path / "a.jsonl"), "train") == [{"a": 1}, {"a": 2}]


def test_a_limit_stops_before_a_broken_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nbroken\n')
    assert read_rows(str(tmp_path / "a.jsonl"), "train", limit=1) == [{"a": 1}]


def read_bad(path, index_of_bad):
    """Reads a file in which one row is bad, and returns that row."""
    rows = read_rows(str(path), "train")
    assert [isinstance(row, dict) for row in rows] == [index != index_of_bad for index in range(len(rows))]
    return rows[index_of_bad]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "not valid JSON"),
        (b"[", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"a": 1, "a": 2}', "not valid JSON"),
    ],
)
def test_broken_line_is_named_by_its_number_in_the_file(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 4}\n')
    bad = read_bad(tmp_path / "a.jsonl", 1)
    assert str(bad) == reason and bad.fault.startswith(f"{reason} in line 3 (")
    assert "expected one JSON object per line" in bad.fault
    assert ("the key 'a' occurs twice" in bad.fault) == line.endswith(b"2}")


@pytest.mark.parametrize("line", ["[1]", '"a"', "3", "null"])
def test_a_line_that_is_not_an_object_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' + line)
    bad = read_bad(tmp_path / "a.jsonl", 1)
    assert bad.fault == f"not a JSON object in line 2: found {line}; expected one JSON object per line"


def test_line_ends_and_separators(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"a": "x\u2028y\x85"}\r\n\r\n\ufeff{"a": NaN}\r\n'.encode())
    first, second = read_rows(str(tmp_path / "a.jsonl"), "train")
    assert first == {"a": "x\u2028y\x85"} and second["a"] != second["a"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_reads_an_array(tmp_path, name, indent):
    text = "\ufeff\n" + json.dumps([*ROWS, 3], indent=indent)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    *rows, bad = read_rows(str(tmp_path / name), "train")
    assert rows == ROWS and bad.fault.startswith("not a JSON object: found 3")


def test_broken_array(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1)[:-9])
    assert "a.json begins with '[' but is not a JSON array: not valid JSON (" in failure(tmp_path / "a.json")


def test_array_among_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('[1]\n{"a": 1}\n')
    assert read_bad(tmp_path / "a.jsonl", 0).fault.startswith("not a JSON object in line 1: found [1]")


def test_utf_16(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-16")
    assert "a.jsonl is UTF-16; expected UTF-8" in failure(tmp_path / "a.jsonl")


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    arrays, names = [array for _, array in columns], [name for name, _ in columns]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names), path)


def test_parquet_row_that_is_not_utf_8(tmp_path):
    import pyarrow

    buffers = pyarrow.array([b"p", b"\xed\xa0\xbd", b"q"]).buffers()
    texts = pyarrow.StringArray.from_buffers(3, buffers[1], buffers[2])
    write_parquet(tmp_path / "a.parquet", [("prompt", texts)])
    assert read_bad(tmp_path / "a.parquet", 1).fault.startswith("not valid UTF-8 (")


def test_parquet_structs_lose_null_keys_and_columns_keep_nulls(tmp_path):
    import pyarrow

    messages = [[{"role": "user", "content": "p", "name": {"x": 1}}, None], [{"role": "tool", "name": {"y": 2}}]]
    write_parquet(tmp_path / "a.parquet", [("prompt", pyarrow.array(messages)), ("id", pyarrow.array([None, 3]))])
    assert read_rows(str(tmp_path / "a.parquet"), "train") == [
        {"prompt": messages[0], "id": None},
        {"prompt": messages[1], "id": 3},
    ]


def test_parquet_with_two_columns_of_one_name(tmp_path):
    import pyarrow

    write_parquet(tmp_path / "a.parquet", [("a", pyarrow.array([1])), ("a", pyarrow.array([2]))])
    assert "several columns are called 'a'" in failure(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(LINES.encode() * 99)[:-20]])
def test_broken_gzip(tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    assert "a.jsonl.gz: cannot be read to the end" in failure(tmp_path / "a.jsonl.gz")


def test_broken_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert "a.parquet: not a readable Parquet file" in failure(tmp_path / "a.parquet")


def test_empty_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    assert "a.jsonl: no rows" in failure(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.pkl", "a.pickle", "a.pt", "a.pth", "a.bin", "a.pkl.gz"])
@pytest.mark.parametrize("exists", [True, False])
def test_pickles_are_never_loaded(tmp_path, name, exists):
    if exists:
        (tmp_path / name).write_bytes(b"x")
    assert "pickles are never loaded" in failure(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.xlsx", ".xlsx"), ("a.parquet.gz", ".gz"), ("a", "a file without a suffix")]
)
def test_other_suffixes_are_named_with_what_is_accepted(tmp_path, name, suffix):
    (tmp_path / name).write_text("x")
    message = failure(tmp_path / name)
    assert f"{name}: cannot read {suffix};" in message
    assert ".jsonl" in message and ".parquet" in message and "Hub" in message


@pytest.mark.parametrize("source", ["nowhere.jsonl", "some/nowhere.csv", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_file(source):
    assert f"{source.removeprefix('./')}: no such file" in failure(source)


def test_empty_source():
    assert "no data given; set --data.train" in failure("")


def test_limit_must_be_positive(tmp_path):
    assert "first 0 rows" in failure(tmp_path / "a.jsonl", limit=0)


@pytest.fixture
def hub(monkeypatch):
    """Replaces the Hub: one dataset with the split `train`, in two configurations."""
    import datasets

    def load_dataset(source, name, *, split):
        if (source, split) != ("owner/set-v1.0", "train"):
            raise ValueError(f"Unknown split {split!r}")
        return datasets.Dataset.from_list([ROWS[2]] if name == "small" else ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_name(hub):
    assert read_rows("owner/set-v1.0", "train") == ROWS
    assert read_rows("owner/set-v1.0", "train", limit=2) == ROWS[:2]
    assert read_rows("owner/set-v1.0", "train", limit=9) == ROWS
    assert read_rows("owner/set-v1.0", "train", name="small") == ROWS[2:]


def test_hub_failure_gives_the_reason(hub):
    message = failure("owner/set-v1.0", "validation")
    assert "neither a local file nor a dataset that could be loaded" in message
    assert "Unknown split 'validation'" in message
