"""Built-in tasks are found by the names that options use."""

import hashlib
import json

import pytest

from qstar_jax import tasks
from qstar_jax.data.reading import read_rows
from qstar_jax.errors import InputError
from qstar_jax.store.hub import open_folder


def test_a_task_is_found_by_its_name_with_or_without_a_seed():
    task, seed = tasks.find("builtin:tiny-tldr")
    assert (task.name, task.source, seed) == ("tiny-tldr", "builtin:tiny-tldr", None)
    assert tasks.find("builtin:tiny-tldr?seed=3") == (task, 3)
    assert tasks.find("rows.jsonl") is None


@pytest.mark.parametrize("source", ["builtin:tldr", "builtin:", "builtin:tiny-tldr?seed=x", "builtin:tiny-tldr?"])
def test_unknown_tasks_are_refused_as_data_and_as_models(source):
    for use in (tasks.find, open_folder, lambda source: read_rows(source, "train")):
        with pytest.raises(InputError, match=r"no such built-in task; expected builtin:tiny-tldr"):
            use(source)


def test_data_of_a_task_have_splits_and_a_seed():
    (row,) = read_rows("builtin:tiny-tldr?seed=3", "train", limit=1)
    assert set(row) == {"prompt", "chosen", "rejected"}
    assert row != read_rows("builtin:tiny-tldr", "train", limit=1)[0]
    with pytest.raises(InputError, match="no split 'dev'; expected one of train, test, corrupted"):
        read_rows("builtin:tiny-tldr", "dev")


def test_the_base_model_is_a_folder_and_has_no_seed():
    assert (open_folder("builtin:tiny-tldr") / "config.json").is_file()
    with pytest.raises(InputError, match="a base model has no seed; name it builtin:tiny-tldr"):
        open_folder("builtin:tiny-tldr?seed=3")


def test_sums_have_a_base_model_that_was_fitted_to_the_solver():
    folder = open_folder("builtin:tiny-sums")
    record = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
    assert record["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_task_knows_its_reward():
    task, _ = tasks.find("builtin:tiny-tldr")
    (row,) = task.rows("corrupted", 0, 1)
    assert task.true_reward(row["prompt"], row["chosen"]) > task.true_reward(row["prompt"], row["rejected"])
    assert task.true_reward("What is the capital of France?", "Paris.") is None
