"""Checkpoints that a disk has damaged, or has no room for."""

import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).parent.parent / "faults"))
from damage import damage, flip

from qstar_jax.cli.main import main
from qstar_jax.errors import InputError
from qstar_jax.store.checkpoint_store import CheckpointError, CheckpointStore
from qstar_jax.store.checkpoints import (
    DAMAGED,
    REFERENCE,
    STEPS,
    Description,
    _read_params,
    abstract_with_shardings,
    read_description,
)
from qstar_jax.store.sole_writer import sole_writer
from qstar_jax.store.tokenizer_folder import TOKENIZER

FILES = {"tokenizer.json": "{}", "chat/template.jinja": "{{ ünï }}\r\n"}
DESCRIPTION = Description("dpo", {"model_type": "llama"}, {"steps": 3}, FILES)


def arrays(step):
    return {"params": {"kernel": jax.random.normal(jax.random.key(step), (30, 40)), "bias": jnp.full(7, float(step))}}


def abstract():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = arrays(0)
    return abstract_with_shardings(tree, jax.tree.map(lambda _: one, tree))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    with CheckpointStore(run, keep=3) as store:
        store.save_frozen(REFERENCE, arrays(0)["params"], DESCRIPTION)
        for step in (2, 4, 6):
            store.save(step, arrays(step), DESCRIPTION)
    return run


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


@pytest.mark.parametrize("seed", range(30))
def test_an_older_checkpoint_takes_the_place_of_a_damaged_one(seed, run, caplog):
    done = damage(run / STEPS / "6", seed)
    with caplog.at_level(logging.WARNING), CheckpointStore(run, keep=3) as store:
        assert store.newest_whole() == 4, done
        assert (run / DAMAGED / "6").is_dir() and not (run / STEPS / "6").exists()
        assert f"{run / STEPS / '6'} is damaged: " in caplog.text and "step 4 is taken instead" in caplog.text
        expected = arrays(4)
        restored = store.restore(4, abstract())
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), restored, expected))
        store.save(8, arrays(8), DESCRIPTION)
    with CheckpointStore(run, keep=3) as store:
        assert store.newest_whole() == 8


def test_a_checkpoint_that_has_lost_its_checksums_and_half_its_files_is_not_taken_for_whole(run):
    for path in [*(run / STEPS / "6").glob("_checksums*"), *(run / STEPS / "6" / "params").rglob("*/*")]:
        path.unlink() if path.is_file() else None
    with CheckpointStore(run, keep=3) as store:
        assert store.newest_whole() == 4


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(run):
    for seed, step in enumerate((2, 4, 6)):
        damage(run / STEPS / str(step), seed + 3)
    with CheckpointStore(run, keep=3) as store, pytest.raises(InputError, match=r"no checkpoint is whole \(6: "):
        store.newest_whole()
    assert len(list((run / STEPS).iterdir())) == 3


@pytest.mark.parametrize("folder", [f"{STEPS}/6", REFERENCE])
def test_flipped_bits_are_not_read(folder, run):
    data = max((path for path in (run / folder).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip(data, random.Random(0))
    with pytest.raises(InputError, match=f"not a complete checkpoint .*{data.name} has other bytes than were written"):
        _read_params(run / folder, abstract()["params"])


def test_checkpoints_of_an_earlier_version_have_no_checksums(run, caplog):
    for path in run.rglob("_checksums*"):
        path.unlink()
    with caplog.at_level(logging.WARNING), CheckpointStore(run, keep=3) as store:
        assert store.newest_whole() == 6
    assert (
        "6 has no complete list of checksums" in caplog.text
        and "nor has an older one: flipped bits would not be found" in caplog.text
    )
    shutil.rmtree(run / STEPS / "6" / "params" / "d")
    with CheckpointStore(run, keep=3) as store, pytest.raises(InputError, match="not a complete checkpoint"):
        store.restore(6, abstract())


def test_the_tokenizer_is_stored_once(run):
    assert read_description(run / STEPS / "4").tokenizer == read_description(run / REFERENCE).tokenizer == FILES
    texts = [path.read_bytes() for path in (run / STEPS).rglob("data.json")]
    assert len(texts) == 3 and not any(b"template" in text for text in texts)
    (run / TOKENIZER / "tokenizer.json").write_text("[]")
    description = read_description(run / STEPS / "4")
    with pytest.raises(InputError, match="tokenizer/ folder of the run is missing, or no longer"):
        description.build_tokenizer()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def big(step):
    return {"params": {"kernel": jax.random.normal(jax.random.key(step), (30_000,))}}


def test_a_full_disk_ends_no_run_and_loses_nothing_that_was_complete(small_disk, caplog):
    with caplog.at_level(logging.WARNING), CheckpointStore(small_disk, keep=9) as store:
        for step in (1, 2, 3, 4):
            store.save(step, big(step), DESCRIPTION)
        store._wait()
        assert "3 was not written (No space left on device); the run goes on, and the newest complete one is 2" in (
            caplog.text
        )
        assert sorted(path.name for path in (small_disk / STEPS).iterdir()) == ["1", "2"]  # nothing half written
        shutil.rmtree(small_disk / STEPS / "1")  # somebody makes room
        store.save(5, big(5), DESCRIPTION)
    with CheckpointStore(small_disk, keep=9) as store:
        assert store.newest_whole() == 5


def test_the_command_line_says_so_without_the_traces_of_threads(small_disk, caplog, monkeypatch):
    monkeypatch.delenv("QSTAR_TRACEBACK", raising=False)
    assert main(["env"]) == 0
    with pytest.raises(CheckpointError), CheckpointStore(small_disk, keep=9) as store:
        for step in (1, 2, 9):
            store.save(step, big(step), DESCRIPTION)
    assert not [record for record in caplog.records if record.name == "absl" and record.exc_info]


def test_a_last_checkpoint_that_has_no_room_is_an_error(small_disk):
    message = r"9 was not written \(No space left .*complete one is 2: .*--resume"
    with pytest.raises(CheckpointError, match=message), CheckpointStore(small_disk, keep=9) as store:
        for step in (1, 2, 9):
            store.save(step, big(step), DESCRIPTION)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give up rights that only root has")
@pytest.mark.parametrize(("mode", "others"), [(0o755, "the newest complete one is 6"), (0o700, "the others cannot be")])
def test_a_folder_without_permission_is_named(mode, others, run):
    message = rf"8 was not written .*[Pp]ermission denied.*{others}"
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        moved = shutil.copytree(run, Path(folder) / "run")
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        moved.chmod(mode)
        with pytest.raises(CheckpointError, match=message), CheckpointStore(moved, keep=3) as store:
            os.seteuid(65534)
            try:
                store.save(8, arrays(8), DESCRIPTION)
                store._wait()
            finally:
                os.seteuid(0)
        assert sorted(path.name for path in (moved / STEPS).iterdir()) == ["2", "4", "6"]
    # Nothing waits for the folder, or the process would not end.
    assert "_SignalingThread" not in {type(thread).__name__ for thread in threading.enumerate()}


def test_a_second_run_into_one_folder_is_refused(tmp_path):
    refused = pytest.raises(InputError, match="is being written by another run")
    with sole_writer(tmp_path / "run"), refused, sole_writer(tmp_path / "run"):
        pass
    with sole_writer(tmp_path / "run"):  # it is free again
        pass
