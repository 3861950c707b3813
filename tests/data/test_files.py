import json
import os

import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.loading import load_examples
from qstar_jax.data.reading import read_rows
from qstar_jax.errors import InputError


def write(folder, *names):
    """Writes files of one row each, which holds the name of its file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"name\n{name}\n" if ".csv" in name else json.dumps({"name": name}) + "\n")


def read(source, split="train", limit=None):
    return [row["name"] for row in read_rows(str(source), split, limit)]


def failure(source, split="train"):
    with pytest.raises(InputError) as caught:
        read_rows(str(source), split)
    return str(caught.value)


def test_files_of_a_folder_in_the_order_of_their_names(tmp_path):
    write(tmp_path, "b.jsonl", "a.jsonl", "README.md", "LICENSE", ".hidden.csv", ".cache/x.parquet", "load.py")
    assert read(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert read(tmp_path, limit=1) == ["a.jsonl"]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train/0.jsonl", "test/0.jsonl"),
        ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
    ],
)
def test_files_named_after_splits(tmp_path, names):
    write(tmp_path, *names)
    assert read(tmp_path) == [name for name in names if "train" in name]
    assert read(tmp_path, "test") == [name for name in names if "test" in name]
    message = failure(tmp_path, "dev")
    assert "has no files of the split 'dev', but of test, train; choose one with --data.train_split" in message


def test_splits_with_similar_names_are_kept_apart(tmp_path):
    write(tmp_path, "train_prefs-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl")
    assert read(tmp_path, "train_sft") == ["train_sft-00000-of-00001.jsonl"]
    assert "but of train_prefs, train_sft" in failure(tmp_path, "train")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("a.csv", "b.jsonl"), "files of several kinds (.csv, .jsonl); name those of one kind by a pattern"),
        (("a.jsonl", "b.xlsx"), "b.xlsx: cannot read .xlsx"),
        (("a.jsonl", "b.pkl"), "b.pkl: pickles are never loaded"),
        (("x/a.jsonl", "y/a.jsonl"), "data lie in several folders ("),
        (("main/train.jsonl", "other/train.jsonl"), "data lie in several folders ("),
        (("README.md",), "the folder holds no data"),
    ],
)
def test_unclear_folders_are_refused(tmp_path, names, problem):
    write(tmp_path, *names)
    assert problem in failure(tmp_path)


def test_patterns(tmp_path):
    write(tmp_path, "b.jsonl", "a.jsonl", "x/c.jsonl", "d.csv")
    assert read(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert read(tmp_path / "**/*.jsonl") == ["a.jsonl", "b.jsonl", "x/c.jsonl"]
    assert read(tmp_path / "[ac].jsonl") == ["a.jsonl"]
    assert "[z].jsonl matches no file; accepted: .jsonl" in failure(tmp_path / "[z].jsonl")
    assert "matches only folders (" in failure(tmp_path / "x*")
    assert "files of several kinds (.csv, .jsonl)" in failure(tmp_path / "*.*")


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    write(tmp_path, "[a].jsonl", "a.jsonl")
    assert read(tmp_path / "[a].jsonl") == ["[a].jsonl"]


def test_faults_name_the_file_among_several(tmp_path):
    write(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "b.jsonl").write_text("{\n")
    _, bad = read_rows(str(tmp_path), "train")
    assert str(bad) == "not valid JSON" and bad.fault.startswith("not valid JSON in line 1 (")
    assert bad.fault.endswith(", in b.jsonl")


def test_a_folder_that_cannot_be_read_or_is_no_folder_of_data(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", "x/b.jsonl")
    monkeypatch.setattr("qstar_jax.data.files._MOST", 2)
    assert f"{tmp_path}: holds more than 2 files and folders; expected a folder of data" in failure(tmp_path)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("x"):
            raise PermissionError(13, "Permission denied", str(path))  # root, as which tests may run, is never denied
        return scan(path)

    monkeypatch.setattr("os.scandir", refuse)
    monkeypatch.setattr("qstar_jax.data.files._MOST", 9)
    assert f"the folder {tmp_path}/x cannot be read (Permission denied); expected a folder" in failure(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "dangling link"])
def test_what_is_no_file_among_the_files_of_a_folder(kind, tmp_path):
    write(tmp_path, "a.jsonl")
    if kind == "pipe":
        os.mkfifo(tmp_path / "b.jsonl")
    else:
        (tmp_path / "b.jsonl").symlink_to("nowhere")
    assert f"{tmp_path}/b.jsonl: " in failure(tmp_path)


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize("source", ["/nowhere/at/all", "a" * 5000, "b" * 300 + ".jsonl", "a/" * 3000 + "*.csv", "a\0b"])
def test_a_source_that_names_nothing_is_refused_with_the_name_of_its_option(source, name):
    options = DataOptions(**{name: source})
    with pytest.raises(InputError, match=rf"--data\.{name} .*(no such file|matches no file); accepted: \.jsonl"):
        load_examples(source, "train", "preferences", None, options)
