import gzip

import datasets
import pyarrow
import pytest

from qstar_jax.data.reading import read_rows
from qstar_jax.errors import InputError

ROWS = [{"prompt": "a, b", "chosen": 'say "é"\n2'}, {"prompt": "3", "chosen": ""}]
CSV = 'prompt,chosen\n"a, b","say ""é""\n2"\n\n3,\n'


def failure(source, split="train"):
    with pytest.raises(InputError) as caught:
        read_rows(str(source), split)
    return str(caught.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.csv.gz", "a.tsv"])
def test_reads_csv(tmp_path, name, mark):
    text = mark + (CSV if "tsv" not in name else CSV.replace("prompt,", "prompt\t").replace('b",', 'b"\t')).encode()
    text = text.replace(b"3,", b"3\t") if "tsv" in name else text
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert read_rows(str(tmp_path / name), "train") == ROWS
    assert read_rows(str(tmp_path / name), "train", limit=1) == ROWS[:1]


def test_an_index_of_pandas_is_a_column_without_a_name(tmp_path):
    (tmp_path / "a.csv").write_text(",prompt\n0,p\n")
    assert read_rows(str(tmp_path / "a.csv"), "train") == [{"": "0", "prompt": "p"}]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("p", "another number of values than columns in line 3: 1 values, and the header names 2 columns"),
        ("p,c,", "another number of values than columns in line 3: 3 values, and the header names 2 columns"),
        ('"p"q,c', "not valid CSV in line 3 ("),
    ],
)
def test_a_broken_row_keeps_its_place(tmp_path, line, fault):
    (tmp_path / "a.csv").write_text(f"prompt,chosen\np,c\n{line}\nq,d\n")
    first, bad, last = read_rows(str(tmp_path / "a.csv"), "train")
    assert bad.fault.startswith(fault) and (first["prompt"], last["prompt"]) == ("p", "q")


def test_a_quote_that_never_ends(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,chosen\np,"c\nq,d\n')
    [bad] = read_rows(str(tmp_path / "a.csv"), "train")
    assert bad.fault.startswith("not valid CSV in line 3 (unexpected end of data)")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("prompt,chosen,prompt\n1,2,3\n", "several columns are called 'prompt'; expected unique names"),
        ("What is 2?,3,4\n", "the first line is no header: '3' cannot be the name of a column"),
        (f"p,{'long ' * 20}\n", "the first line is no header: 'long"),
        ("p,\n1,2\n", "the first line is no header: ''"),
        ("prompt;chosen\n1;2\n", "the header 'prompt;chosen' has no ',' but ';'"),
        ("prompt\tchosen\n1\t2\n", "has no ',' but '\\t'; expected columns separated by commas (.csv) or tabs (.tsv)"),
        ("", "no rows"),
        ("prompt,chosen\n", "no rows"),
        ("prompt\né\n".encode("cp1252"), "not UTF-8 ('utf-8' codec can't decode byte 0xe9"),
        ("prompt\né\n".encode("cp1252"), "iconv -f WINDOWS-1252 -t UTF-8"),
        ("prompt\né\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_unusable_csv(tmp_path, content, problem):
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert problem in failure(tmp_path / "a.csv")


def test_broken_gzip(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(CSV.encode() * 99)[:-20])
    assert "a.csv.gz: cannot be read to the end" in failure(tmp_path / "a.csv.gz")


@pytest.mark.parametrize("make", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_reads_arrow(tmp_path, make):
    table = pyarrow.Table.from_pylist(ROWS)
    with make(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert read_rows(str(tmp_path / "a.arrow"), "train") == ROWS
    (tmp_path / "a.arrow").write_bytes(b"no Arrow")
    assert "a.arrow: not a readable Arrow file" in failure(tmp_path / "a.arrow")


def test_reads_folders_of_save_to_disk(tmp_path):
    chat = [{"role": "user", "content": "p"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    train, test = datasets.Dataset.from_list([{"prompt": chat}] * 3), datasets.Dataset.from_list([{"prompt": chat}])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "splits")
    assert read_rows(str(tmp_path / "one"), "train", limit=2) == [{"prompt": chat}] * 2  # Arrow's nulls are removed
    assert [len(read_rows(str(tmp_path / "splits"), split)) for split in ("train", "test")] == [3, 1]
    assert "has no split 'dev', but train, test; choose one with --data.train_split" in failure(
        tmp_path / "splits", "dev"
    )
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "one: not a readable folder of save_to_disk (" in failure(tmp_path / "one")
