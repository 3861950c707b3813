"""Folders in buckets, against servers of S3 and of Google Cloud Storage on loopback."""

import sys
import time
from pathlib import Path

import pytest

from qstar_jax.cli.main import main
from qstar_jax.config import DataConfig, DataOptions, DpoConfig, MeshOptions, ReferenceOptions
from qstar_jax.config.paths import recorded
from qstar_jax.errors import InputError
from qstar_jax.store.cloud import at_hand, writing
from qstar_jax.store.cloud.copies import Copies
from qstar_jax.store.cloud.place import Place
from qstar_jax.store.cloud.reading import copy
from qstar_jax.store.cloud.writing import CloudError, Mirror


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of one machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qstar_jax" / "cloud"


def place(address: str) -> Place:
    return Place.at("out", address)


def write(folder: Path, **files: str):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def checkpoint(folder: Path, step: int, is_complete: bool = True):
    names = ["description/a.json", "params/d/x", "opt_state/y", *(["_checksums.0-of-1.json"] * is_complete)]
    write(folder, **{f"checkpoints/{step}/{name}": f"{name} of {step}" for name in names})


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def there(address: str) -> set[str]:
    return set(place(address).listing(place(address).root))


def test_a_folder_goes_to_its_address_and_comes_back_on_another_machine(bucket, tmp_path, monkeypatch):
    address = f"{bucket}/runs/mine"
    with Mirror(place(address)) as folder:
        assert not folder.exists()
        checkpoint(folder, 2)
        checkpoint(folder, 4, is_complete=False)  # as while Orbax writes it
        write(
            folder, **{"config.yaml": "out: x", "checkpoints/6.orbax-checkpoint-tmp-1/x": "", ".x.tmp": "", ".lock": ""}
        )
    complete = {f"checkpoints/2/{name}" for name in ("description/a.json", "params/d/x", "opt_state/y")}
    complete |= {"checkpoints/2/_checksums.0-of-1.json", "config.yaml"}
    assert there(address) == complete
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with Mirror(place(address)) as folder:
        assert names(folder) == complete and (folder / "config.yaml").read_text() == "out: x"
        checkpoint(folder, 4)
        for path in sorted((folder / "checkpoints" / "2").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert there(address) == {name.replace("/2/", "/4/") for name in complete}
    # What one reads: no optimizer, and nothing twice.
    model = copy(place(address))
    assert names(model) == {name.replace("/2/", "/4/") for name in complete if "opt_state" not in name}
    gets = []
    monkeypatch.setattr(Copies, "_each", lambda self, work, names, console=None: gets.extend(names))
    assert copy(place(address)) == model and not gets


def test_what_a_process_that_was_killed_has_left_is_neither_read_nor_kept(bucket, caplog):
    address, files = f"{bucket}/run", place(f"{bucket}/run").files
    root = place(address).root
    for step, listed in ((2, True), (4, False)):
        for name in ("description/a", "params/x", *(["_checksums.0-of-1.json"] * listed)):
            files.pipe_file(f"{root}/checkpoints/{step}/{name}", b"x")
    files.pipe_file(f"{root}/config.yaml", b"{}")
    assert not any("checkpoints/4" in name for name in names(copy(place(address))))
    assert "not complete" in caplog.text
    with Mirror(place(address)) as folder:
        assert not (folder / "checkpoints" / "4").exists()
    assert not any("checkpoints/4" in name for name in there(address))
    files.rm(root, recursive=True)  # a folder that was deleted there is empty here
    with Mirror(place(address)) as folder:
        assert not folder.exists()


def test_lists_of_checksums_go_last_and_are_deleted_first(bucket, monkeypatch):
    sent = []
    put, delete = Copies.upload, Copies.delete
    monkeypatch.setattr(Copies, "upload", lambda self, names: (sent.extend(names), put(self, names)))
    with Mirror(place(f"{bucket}/run")) as folder:
        checkpoint(folder, 2)
        write(folder, **{"metrics.jsonl": "{}", "reference/_checksums.0-of-1.json": "", "reference/params/x": ""})
    position = {name: sent.index(name) for name in sent}
    assert position["metrics.jsonl"] < position["checkpoints/2/params/d/x"]
    assert position["reference/params/x"] < position["reference/_checksums.0-of-1.json"]
    assert max(position, key=position.get) == "checkpoints/2/_checksums.0-of-1.json"
    removed = []
    copies = Copies(place(f"{bucket}/run"), place(f"{bucket}/run").root, folder)
    monkeypatch.setattr(copies.place.files, "rm_file", removed.append)
    delete(copies, [name for name in copies.versions if name.startswith("checkpoints")])
    assert removed[0].endswith("_checksums.0-of-1.json") and len(removed) == 4


def test_it_is_uploaded_while_it_is_written_and_only_what_has_changed(bucket, monkeypatch):
    monkeypatch.setattr(writing, "INTERVAL", 0.05)
    address, files = f"{bucket}/log", place(f"{bucket}/log").files
    with Mirror(place(address)) as folder:
        write(folder, **{"metrics.jsonl": "1\n", "config.yaml": "{}"})
        deadline = time.monotonic() + 20
        while there(address) != {"metrics.jsonl", "config.yaml"}:
            assert time.monotonic() < deadline
        before = place(address).listing(place(address).root)
        write(folder, **{"metrics.jsonl": "1\n2\n"})
    after = place(address).listing(place(address).root)
    assert before["config.yaml"] == after["config.yaml"] and before["metrics.jsonl"] != after["metrics.jsonl"]
    assert files.cat_file(f"{place(address).root}/metrics.jsonl") == b"1\n2\n"


def test_files_patterns_and_parts_of_runs_are_read(bucket):
    with Mirror(place(f"{bucket}/deep/run")) as folder:
        checkpoint(folder, 2)
        checkpoint(folder, 4)
        checkpoint(folder, 6)
        write(
            folder, **{"config.yaml": "{}", "tokenizer/t.json": "{}", "best.json": '{"step": 2}', "data/a.jsonl": "a"}
        )
        write(folder, **{"data/b.jsonl": "b", "data/c.txt": "c"})
    steps = {name.split("/")[1] for name in names(copy(place(f"{bucket}/deep/run"))) if name.startswith("checkpoints")}
    assert steps == {"2", "6"}  # the best and the newest
    four = copy(place(f"{bucket}/deep/run/checkpoints/4"))
    assert (four / "params/d/x").read_text() == "params/d/x of 4" and (
        four.parent.parent / "tokenizer/t.json"
    ).is_file()
    assert copy(place(f"{bucket}/deep/run/data/a.jsonl")).read_text() == "a"
    pattern = copy(place(f"{bucket}/deep/run/data/*.jsonl"))
    assert pattern.name == "*.jsonl" and {path.name for path in pattern.parent.glob("*.jsonl")} == {
        "a.jsonl",
        "b.jsonl",
    }


def test_options_are_replaced_by_paths_and_recorded_by_address(bucket, monkeypatch):
    files = place(f"{bucket}/data").files
    files.pipe_file(place(f"{bucket}/d.jsonl").root, b"{}")
    config = DpoConfig(
        model="hub/name",
        out=f"{bucket}/run",
        data=DataOptions(train=f"{bucket}/d.jsonl"),
        reference=ReferenceOptions(cache=f"{bucket}/cache"),
    )
    with at_hand(config) as local:
        assert local.model == "hub/name" and Path(local.data.train).read_text() == "{}"
        assert recorded(local) == recorded(config) and recorded(config)["out"] == config.out
        with pytest.raises(InputError, match=r"--out .*is being written by another run"), at_hand(config):
            pass
        write(Path(local.reference.cache), x="1")
    assert there(f"{bucket}/cache") == {"x"}
    shared = DpoConfig(model="m", out=f"{bucket}/run", mesh=MeshOptions(multi_process=True))
    with pytest.raises(InputError, match=r"--out .*with mesh.multi_process"), at_hand(shared):
        pass


def test_what_cannot_be_opened_is_one_sentence(bucket, tmp_path, monkeypatch, capsys):
    scheme = bucket.partition("://")[0]
    for words, message in (
        (f"score --model {scheme}://nowhere-1/m --out {tmp_path}/o", f"--model {scheme}://nowhere-1/m: "),
        (f"score --model {bucket}/nothing --out {tmp_path}/o", "there is nothing"),
        (f"dpo --model m --out {scheme}://nowhere-1/r --data.train d", f"--out {scheme}://nowhere-1/r: "),
        (f"data {bucket}/nothing.jsonl", "there is nothing"),
    ):
        assert main(words.split()) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "o").exists()


def test_an_upload_that_fails_says_where_all_is(bucket, monkeypatch):
    def fail(self, names):
        raise OSError("the network is down")

    monkeypatch.setattr(Copies, "upload", fail)
    with pytest.raises(CloudError, match=r"the network is down.*all is in "), Mirror(place(f"{bucket}/run")) as folder:
        write(folder, x="1")
    assert (folder / "x").read_text() == "1"
    with (
        pytest.raises(ZeroDivisionError),
        Mirror(place(f"{bucket}/run")),
    ):  # the error before it is the one that is shown
        raise ZeroDivisionError


def test_what_a_failed_upload_left_is_uploaded_by_the_next_run(bucket, tmp_path, monkeypatch):
    address = f"{bucket}/run"
    with Mirror(place(address)) as folder:
        write(folder, **{"metrics.jsonl": "1\n"})
        checkpoint(folder, 2)
    with monkeypatch.context() as patch, pytest.raises(CloudError), Mirror(place(address)) as folder:
        patch.setattr(Copies, "upload", lambda self, names: place(address).files.cat_file(f"{self.root}/nothing"))
        write(folder, **{"metrics.jsonl": "1\n2\n"})
        checkpoint(folder, 4)
    with Mirror(place(address)) as folder:
        assert (folder / "metrics.jsonl").read_text() == "1\n2\n" and (folder / "checkpoints/4/params/d/x").exists()
    assert {"checkpoints/2/opt_state/y", "checkpoints/4/opt_state/y"} < there(address)
    # Another machine has gone on since: what it wrote is what counts.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with Mirror(place(address)) as elsewhere:
        write(elsewhere, **{"metrics.jsonl": "1\n2\n3\n"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(folder, **{"metrics.jsonl": "1\n2\nother\n"})
    with Mirror(place(address)) as folder:
        assert (folder / "metrics.jsonl").read_text() == "1\n2\n3\n"


def test_names_that_leave_the_copy_are_refused(monkeypatch):
    hostile = Place.at("model", "memory://bucket/m")
    hostile.files.pipe_file("/bucket/m/a", b"x")
    found = {"/bucket/m/../../evil": {"type": "file", "size": 1}}
    monkeypatch.setattr(hostile.files, "find", lambda *args, **options: found)
    with pytest.raises(InputError, match="would lie outside of its copy"):
        copy(hostile)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs:/bucket/run", "expected a path, or an address such as gs://bucket/folder"),
        ("file:///tmp/run", "expected a path, or an address"),
        ("nowhere://bucket/run", "not opened .*nowhere"),
        ("gs://bucket/run", r"needs a package .*pip install 'qstar_jax\[cloud\]'"),
        ("s3://bucket/run", r"needs a package .*pip install 'qstar_jax\[cloud\]'"),
    ],
)
def test_schemes_that_are_unknown_or_not_installed_are_refused(address, message, monkeypatch):
    import fsspec  # noqa: F401 (fills its registry)

    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    for scheme in ("gs", "s3"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(InputError, match=f"--file {address}: .*{message}"), at_hand(DataConfig(file=address)):
        pass


def test_nothing_is_written_to_a_web_server():
    pytest.importorskip("aiohttp", reason="needs the extra `cloud`")  # by which fsspec opens http://
    with pytest.raises(InputError, match="expected a folder in which files can be written"):
        Mirror(Place.at("out", "http://127.0.0.1:9/run")).__enter__()
