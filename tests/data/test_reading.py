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


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert read_rows(str(tmp_path / "a.jsonl"), "train") == [{"a": 1}, {"a": 2}]


def test_a_limit_stops_before_a_broken_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nbroken\n')
    assert read_rows(str(tmp_path / "a.jsonl"), "train", limit=1) == [{"a": 1}]


@pytest.mark.parametrize("line", [b'{"a": ', b"[", b'{"a": "\xff"}'])
def test_broken_line_is_named_by_its_number_in_the_file(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    assert "a.jsonl line 3: not valid JSON (" in failure(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("line", "found"), [("[1]", "list"), ('"a"', "str"), ("3", "int")])
def test_line_that_is_no_object_is_named(tmp_path, line, found):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' + line)
    assert f"a.jsonl line 2: found a JSON {found}; expected one JSON object a line" in failure(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(LINES.encode() * 99)[:-20]])
def test_broken_gzip(tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    assert "a.jsonl.gz: cannot be read to its end" in failure(tmp_path / "a.jsonl.gz")


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
    ("name", "suffix"), [("a.csv", ".csv"), ("a.parquet.gz", ".gz"), ("a", "a file without a suffix")]
)
def test_other_suffixes_are_named_with_what_is_accepted(tmp_path, name, suffix):
    (tmp_path / name).write_text("x")
    message = failure(tmp_path / name)
    assert f"{name}: cannot read {suffix};" in message
    assert ".jsonl" in message and ".parquet" in message and "hub" in message


@pytest.mark.parametrize("source", ["nowhere.jsonl", "some/nowhere.csv", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_file(source):
    assert f"{source}: no such file" in failure(source)


def test_folder_and_empty_source(tmp_path):
    assert "is a folder" in failure(tmp_path)
    assert "no data named; set --data.train" in failure("")


def test_limit_must_be_positive(tmp_path):
    assert "first 0 rows" in failure(tmp_path / "a.jsonl", limit=0)


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: one data set with the split `train`."""
    import datasets

    def load_dataset(source, *, split):
        if (source, split) != ("owner/set-v1.0", "train"):
            raise ValueError(f"Unknown split {split!r}")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_name(hub):
    assert read_rows("owner/set-v1.0", "train") == ROWS
    assert read_rows("owner/set-v1.0", "train", limit=2) == ROWS[:2]
    assert read_rows("owner/set-v1.0", "train", limit=9) == ROWS


def test_hub_failure_gives_the_reason(hub):
    message = failure("owner/set-v1.0", "validation")
    assert "neither a file here nor a data set that could be loaded" in message
    assert "Unknown split 'validation'" in message
