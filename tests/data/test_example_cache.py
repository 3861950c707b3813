"""Tokens on disk: they are those that would be made anew, and whatever these depend on changes their place."""

import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qstar_jax.config import DataOptions
from qstar_jax.data import building, example_cache, loading
from qstar_jax.data.example_cache import cache_folder, fingerprint
from qstar_jax.data.identity import examples_identity
from qstar_jax.data.loading import load_examples
from qstar_jax.data.reading import open_rows
from qstar_jax.errors import InputError

ROWS = [
    {"prompt": f"w{i} w{i + 1}", "chosen": f"w{i} w3", "rejected": "w4 w5 w6" if i != 4 else "w4 w3"} for i in range(20)
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path / "datasets" / "qstar_jax"


@pytest.fixture
def calls(monkeypatch):
    """Lists how often rows are tokenized."""
    made, tokenize_rows = [], building.tokenize_rows
    monkeypatch.setattr(building, "tokenize_rows", lambda *args, **more: made.append(1) or tokenize_rows(*args, **more))
    return made


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "broken\n")
    return path


def load(source, tokenizer, options=DataOptions(), **more):
    return load_examples(str(source), "train", "preferences", tokenizer, options, **more)


def kept(folder):
    """The folders of examples that are kept."""
    return [path for path in folder.glob("*") if path.is_dir()]


def same(one, other):
    faults = [[entry.fault for entry in dataset.dropped] for dataset in (one, other)]
    assert (one.dropped, one.summary, one.date, faults[0]) == (other.dropped, other.summary, other.date, faults[1])
    assert examples_identity(list(one.examples)) == examples_identity(other.examples)
    np.testing.assert_array_equal(one.examples.lengths.rows, other.examples.lengths.rows)


def test_a_second_start_does_not_tokenize(source, tiny_tokenizer, calls, folder):
    first, second = load(source, tiny_tokenizer), load(source, tiny_tokenizer)
    assert calls == [1] and len(kept(folder)) == 1
    same(first, second)
    same(second, load(source, tiny_tokenizer, DataOptions(cache=False)))
    assert [entry.reason for entry in second.dropped] == ["chosen equals rejected", "not valid JSON"]


def test_without_the_option_nothing_is_kept(source, tiny_tokenizer, calls, folder):
    for _ in range(2):
        load(source, tiny_tokenizer, DataOptions(cache=False))
    assert calls == [1, 1] and not folder.exists()


def test_labels_and_dates_are_kept(tmp_path, character_tokenizer, calls):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": f"b{i}", "label": i > 1} for i in range(4)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = character_tokenizer(chat_template=template)
    both = [load_examples(str(tmp_path / "labels.jsonl"), "", "labels", tokenizer, DataOptions()) for _ in range(2)]
    assert calls == [1] and both[0].date is not None
    same(*both)
    assert [bool(e.outcome["labels"]) for e in both[1].examples] == [False, False, True, True]


def test_built_in_data_are_kept(tiny_tokenizer, calls):
    for limit in (5, 5, 6):
        load_examples("builtin:tiny-tldr", "train", "preferences", tiny_tokenizer, DataOptions(), limit)
    assert calls == [1, 1]


def test_many_rows_are_read_anew(source, tiny_tokenizer, monkeypatch):
    few = load(source, tiny_tokenizer, DataOptions(cache=False))
    monkeypatch.setattr(loading, "_KEPT", 0)
    same(load(source, tiny_tokenizer, DataOptions(cache=False)), few)


def key_of(source, tokenizer, options=DataOptions(), split="train", kind="preferences", limit=None, **model):
    return fingerprint(open_rows(str(source), "train", limit), split, kind, tokenizer, options, **model)


OPTIONS = {
    "prompt": "question",
    "turns": "last",
    "as_chat": True,
    "chat_template_kwargs": {"a": 1},
    "date": "2026-01-31",
    "bad_rows": "stop",
    "max_length": 100,
    "name": "small",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_change_the_fingerprint(source, tiny_tokenizer, name):
    assert key_of(source, tiny_tokenizer, DataOptions(**{name: OPTIONS[name]})) != key_of(source, tiny_tokenizer)


def test_options_of_batches_do_not_change_the_fingerprint(source, tiny_tokenizer):
    options = DataOptions(train="other", layout="plain", row_length=99, cache=False)
    assert key_of(source, tiny_tokenizer, options) == key_of(source, tiny_tokenizer)


def test_the_source_changes_the_fingerprint(source, tiny_tokenizer, tmp_path):
    before = key_of(source, tiny_tokenizer)
    shutil.copy(source, tmp_path / "other.jsonl")
    times = source.stat().st_mtime_ns
    source.write_text(source.read_text().replace("w4", "w7"))  # of the same size and age
    os.utime(source, ns=(times, times))
    assert key_of(source, tiny_tokenizer) != before
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "other.jsonl", tmp_path / "sub" / "pairs.jsonl")
    assert key_of(tmp_path / "sub" / "pairs.jsonl", tiny_tokenizer) == before
    others = ({"split": "test"}, {"kind": "labels"}, {"limit": 3}, {"vocabulary": 60}, {"eos_ids": (2, 5)})
    assert len({before, *(key_of(tmp_path / "other.jsonl", tiny_tokenizer, **other) for other in others)}) == 6


def test_every_piece_of_a_long_file_counts(source, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(example_cache, "_PIECE", 64)
    before = key_of(source, tiny_tokenizer)
    source.write_text(source.read_text().replace("broken", "BROKEN"))
    assert key_of(source, tiny_tokenizer) != before


def test_the_tokenizer_changes_the_fingerprint(source, character_tokenizer, tmp_path):
    keys = [
        key_of(source, character_tokenizer(**more))
        for more in ({}, {"bos": "[B]"}, {"merges": ["ab"]}, {"chat_template": "{{ messages }}"}, {"before": "[E]"})
    ]
    assert len(set(keys)) == 5 and key_of(source, character_tokenizer()) == keys[0]
    tokenizer = character_tokenizer()
    tokenizer("a", truncation=True, max_length=1)  # a state of the last call
    assert key_of(source, tokenizer) == keys[0]
    template, chosen = tmp_path / "a.jinja", []
    for text in ("{{ messages }}", "{{ messages }}!"):
        template.write_text(text)
        chosen.append(key_of(source, tokenizer, DataOptions(chat_template=str(template))))
    assert chosen[0] != chosen[1]


def test_the_day_changes_the_fingerprint_where_it_is_printed(source, character_tokenizer, monkeypatch):
    class Tomorrow:
        @staticmethod
        def now():
            return example_datetime(2099, 1, 1)

    example_datetime = example_cache.datetime
    plain, dated = (character_tokenizer(chat_template=text) for text in ("{{ messages }}", "{{ strftime_now('%d') }}"))
    fixed = DataOptions(date="2026-01-31")
    before = [key_of(source, plain), key_of(source, dated, fixed), key_of(source, dated)]
    monkeypatch.setattr(example_cache, "datetime", Tomorrow)
    after = [key_of(source, plain), key_of(source, dated, fixed), key_of(source, dated)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, True, False]


def test_code_and_libraries_change_the_fingerprint(source, tiny_tokenizer, monkeypatch, tmp_path):
    before = key_of(source, tiny_tokenizer)
    code = tmp_path / "code"
    shutil.copytree(Path(example_cache.__file__).parent, code)
    monkeypatch.setattr(example_cache, "__file__", str(code / "example_cache.py"))
    assert key_of(source, tiny_tokenizer) == before
    (code / "splitting.py").write_text((code / "splitting.py").read_text() + "\n")
    changed = key_of(source, tiny_tokenizer)
    monkeypatch.setattr(example_cache, "version", lambda name: "0")
    assert len({before, changed, key_of(source, tiny_tokenizer)}) == 3


def damage_bytes(path):
    table = path / "examples.arrow"
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)


def shorten(path):
    table = path / "examples.arrow"
    table.write_bytes(table.read_bytes()[:-100])


DAMAGES = {
    "another byte": damage_bytes,
    "a shorter table": shorten,
    "no table": lambda path: (path / "examples.arrow").unlink(),
    "no seal": lambda path: (path / "complete.json").unlink(),
    "half a seal": lambda path: (path / "complete.json").write_text('{"table": '),
    "another seal": lambda path: (path / "complete.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_examples_are_made_again(source, tiny_tokenizer, calls, folder, damage):
    first = load(source, tiny_tokenizer)
    [path] = kept(folder)
    DAMAGES[damage](path)
    again = load(source, tiny_tokenizer)
    assert calls == [1, 1] and f"were damaged, and are made again: {path}" in again.summary
    same(replace(again, notes=again.notes[1:]), first)
    same(load(source, tiny_tokenizer), first)
    assert calls == [1, 1] and kept(folder) == [path]


def test_an_interrupted_start_leaves_nothing(source, tiny_tokenizer, folder, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "tokenize_rows", stop)
        load(source, tiny_tokenizer)
    assert kept(folder) == []
    # What a killed process could not remove is removed by the next one that makes the same examples.
    load(source, tiny_tokenizer)
    [path] = kept(folder)
    path.rename(path.with_name(f".{path.name}.0"))
    load(source, tiny_tokenizer)
    assert kept(folder) == [path]


def test_rows_that_cannot_be_used_are_refused_every_time(tmp_path, tiny_tokenizer, folder):
    (tmp_path / "bad.jsonl").write_text("broken\n")
    for _ in range(2):
        with pytest.raises(InputError, match="not valid JSON"):
            load(tmp_path / "bad.jsonl", tiny_tokenizer)
    assert kept(folder) == []


def test_of_several_at_once_one_tokenizes(source, tiny_tokenizer, calls):
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: load(source, tiny_tokenizer), range(4)))
    assert calls == [1]
    for dataset in datasets:
        same(dataset, datasets[0])


def test_where_files_cannot_be_locked_all_get_the_same(source, tiny_tokenizer, folder, monkeypatch):
    def refuse(self, *args, **more):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: load(source, tiny_tokenizer), range(4)))
    for dataset in datasets:
        same(dataset, datasets[0])
    assert len(kept(folder)) == 1


def test_what_a_faster_process_wrote_stays(source, tiny_tokenizer, folder, monkeypatch):
    first = load(source, tiny_tokenizer)
    written = kept(folder)[0].stat().st_ino
    read, found = example_cache.ExampleCache.read, iter([None])  # the second looks before the first is ready
    monkeypatch.setattr(example_cache.ExampleCache, "read", lambda self: next(found, read(self)))
    same(load(source, tiny_tokenizer), first)
    assert [path.stat().st_ino for path in kept(folder)] == [written]


PROGRAM = """
import sys
from qstar_jax.config import DataOptions
from qstar_jax.data import building
from qstar_jax.data.loading import load_examples
from transformers import PreTrainedTokenizerFast

tokenize_rows = building.tokenize_rows
building.tokenize_rows = lambda *args, **more: print("tokenized") or tokenize_rows(*args, **more)
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
print(len(load_examples(sys.argv[1], "train", "preferences", tokenizer, DataOptions()).examples))
"""


def test_of_two_processes_one_tokenizes(source, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "tokenizer")]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(printed, key=len) == [["19"], ["tokenized", "19"]]


def test_a_folder_that_cannot_be_written_is_named(source, tiny_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be kept in .*file.*HF_DATASETS_CACHE.*--data\.cache false"):
        load(source, tiny_tokenizer)


def test_the_place_is_that_of_the_library_datasets(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    assert cache_folder() == tmp_path / "datasets" / "qstar_jax"
    monkeypatch.delenv("HF_DATASETS_CACHE")
    default = Path(datasets.config.HF_CACHE_HOME) / "datasets"
    assert cache_folder().parent == default


def test_progress_is_shown_only_if_it_takes_longer_than_a_moment(source, tiny_tokenizer, monkeypatch):
    def shown():
        console = Console(file=io.StringIO(), force_terminal=True, width=200)
        load(source, tiny_tokenizer, DataOptions(cache=False), console=console)
        return console.file.getvalue()

    assert shown() == ""
    monkeypatch.setattr(loading, "_MOMENT", 0.0)
    assert f"tokenizing {source}" in shown() and "21/21" in shown()
