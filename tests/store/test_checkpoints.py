import json
import shutil
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from qstar_jax.config import ComputeOptions, DpoConfig, MeshOptions, OptimizerOptions
from qstar_jax.errors import InputError
from qstar_jax.models.decoder import SHARDING_OVERRIDES
from qstar_jax.sharding import make_mesh, tree_shardings
from qstar_jax.store import hub
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.checkpoints import (
    REFERENCE,
    STEPS,
    Description,
    abstract_with_shardings,
    find_checkpoint,
    read_checkpoint_params,
    read_description,
    reference_of,
)
from qstar_jax.store.open import load_model, param_shardings
from qstar_jax.training.optimizers import make_optimizer

WRITER = MeshOptions(data=2, fsdp=4, min_shard_size=64)
READERS = {"one device": MeshOptions(data=1), "8 x 1": MeshOptions(data=1, fsdp=8, min_shard_size=64)}


def mesh_of(options):
    return make_mesh(options, devices=jax.devices()[:1] if options.fsdp == 1 else None)


def shardings_of(model, optimizer, options):
    mesh = mesh_of(options)
    opt_state = jax.eval_shape(optimizer.init, model.abstract_params())
    overrides = SHARDING_OVERRIDES
    return param_shardings(model, mesh, options), tree_shardings(opt_state, mesh, options, overrides)


@pytest.fixture(scope="module")
def description(tiny_model, tiny_tokenizer):
    options = asdict(DpoConfig(model="some/model", out="runs/a"))
    return Description("dpo", tiny_model.to_hf(), options, hub.tokenizer_files(tiny_tokenizer))


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(OptimizerOptions(), 4)


@pytest.fixture(scope="module")
def opt_state(optimizer, tiny_params):
    """Optimizer state whose moments are not zero."""
    shake = jax.tree.map(lambda x: x * 0.5 + 1, tiny_params)
    return optimizer.update(shake, optimizer.init(tiny_params), tiny_params)[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, tiny_params, opt_state, optimizer, description):
    """The folder of a run on a 2 x 4 mesh: steps 2 and 4 of three that were saved, and a reference."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    params_shardings, opt_shardings = shardings_of(tiny_model, optimizer, WRITER)
    params = jax.tree.map(jax.device_put, tiny_params, params_shardings)
    state = jax.tree.map(jax.device_put, opt_state, opt_shardings)
    assert params["embed"]["embedding"].addressable_shards[0].data.shape == (15, 32)
    with jax.set_mesh(mesh_of(WRITER)), CheckpointStore(folder, keep=2) as store:
        store.save_frozen(REFERENCE, jax.tree.map(lambda x: x + 1, params), description)
        for step in (1, 2, 4):
            arrays = {"params": jax.tree.map(lambda x: x * step, params), "opt_state": state}  # noqa: B023
            store.save(step, arrays, description)
    return folder


def test_a_checkpoint_is_restored_as_it_was_saved(tmp_path):
    params = {"kernel": jnp.array([1.0, 2.0])}
    description = Description(verb="sft", model={"model_type": "llama"}, options={"steps": 3}, tokenizer={})
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(3, {"params": params}, description)
    with CheckpointStore(tmp_path, keep=1) as store:
        assert store.latest_step == 3
        assert store.describe(3) == description
        shardings = {"kernel": jax.sharding.SingleDeviceSharding(jax.devices()[0])}
        restored = store.restore(3, {"params": abstract_with_shardings(params, shardings)})
    assert restored["params"]["kernel"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", READERS)
def test_another_mesh_restores_the_same_bits(name, run, tiny_model, tiny_params, opt_state, optimizer):
    options = READERS[name]
    params_shardings, opt_shardings = shardings_of(tiny_model, optimizer, options)
    abstract = abstract_with_shardings(tiny_model.abstract_params(), params_shardings)
    abstract_opt = jax.eval_shape(optimizer.init, tiny_model.abstract_params())
    abstract_opt = abstract_with_shardings(abstract_opt, opt_shardings)
    with CheckpointStore(run, keep=2) as store:
        assert store.latest_step == 4
        arrays = store.restore(4, {"params": abstract, "opt_state": abstract_opt})
        params, state = arrays["params"], arrays["opt_state"]
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(lambda x: x * 4, tiny_params))
    jax.tree.map(np.testing.assert_array_equal, state, opt_state)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b, x: a.is_equivalent_to(b, x.ndim), shardings, (params_shardings, opt_shardings), (params, state)
        )
    )


@pytest.mark.parametrize("name", READERS)
def test_models_are_opened_from_a_checkpoint_on_any_mesh(name, run, tiny_model, tiny_params):
    options = READERS[name]
    loaded = load_model(run, ComputeOptions(), mesh_of(options), options)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.tree.map(lambda x: x * 4, tiny_params))
    assert loaded.model == tiny_model and loaded.source == run / STEPS / "4"
    assert loaded.reference == run / REFERENCE


def test_parameters_are_read_in_another_dtype(run, tiny_model, tiny_params, one_device):
    model = type(tiny_model)(tiny_model.model_type, tiny_model.config, ComputeOptions(param_dtype="bfloat16"))
    params = read_checkpoint_params(run / STEPS / "2", model, param_shardings(model, one_device, MeshOptions()))
    expected = jax.tree.map(lambda x: (x * 2).astype(jnp.bfloat16), tiny_params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), params, expected)


def test_only_the_newest_are_kept(run):
    assert sorted(path.name for path in (run / STEPS).iterdir() if path.name.isdigit()) == ["2", "4"]


def test_what_a_killed_process_left_is_removed_before_the_store_is_used(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    left = copy / "checkpoints" / f"6{TMP_DIR_SUFFIX}"
    left.mkdir()
    (left / "half").write_text("of an array")
    with CheckpointStore(copy, keep=2) as store:
        assert not left.exists()
        assert store.latest_step == 4


def test_a_checkpoint_is_found_from_every_folder(run, tmp_path, description):
    newest = run / STEPS / "4"
    for folder in (run, run / STEPS, newest):
        assert find_checkpoint(folder) == newest
    assert find_checkpoint(run / STEPS / "2") == run / STEPS / "2"
    assert find_checkpoint(run / REFERENCE) == run / REFERENCE
    assert reference_of(newest, description) == run / REFERENCE
    for folder in (tmp_path, tmp_path / "missing", run / "params"):
        assert find_checkpoint(folder) is None


def test_steps_are_compared_as_numbers(run, tmp_path):
    for name in ("9", "10"):
        shutil.copytree(run / STEPS / "4", tmp_path / STEPS / name)
    assert find_checkpoint(tmp_path) == tmp_path / STEPS / "10"


def test_a_step_without_reference_has_none(run, tmp_path, description):
    shutil.copytree(run / STEPS / "4", tmp_path / STEPS / "4")
    assert reference_of(tmp_path / STEPS / "4", description) is None


@pytest.mark.parametrize("folder", [f"{STEPS}/4", f"{STEPS}/2", REFERENCE])
def test_descriptions_are_restored(folder, run, description):
    restored = read_description(run / folder)
    assert restored.verb == "dpo" and restored.model == description.model
    assert json.loads(json.dumps(restored.options)) == json.loads(json.dumps(description.options))
    assert restored.tokenizer == description.tokenizer


def test_a_description_restores_the_tokenizer(description, tiny_tokenizer):
    tokenizer = description.build_tokenizer()
    for text in ("w1 w2 w55", "w0", "no such word"):
        assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    ids = tiny_tokenizer("w7 w8").input_ids
    assert tokenizer.decode(ids) == tiny_tokenizer.decode(ids)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(tiny_tokenizer, name)


def test_a_description_restores_the_chat_template(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    again = Description("dpo", {}, {}, hub.tokenizer_files(tokenizer)).build_tokenizer()
    assert again.chat_template == tokenizer.chat_template


def test_tokenizer_files_cannot_leave_their_folder(description, tmp_path):
    # A checkpoint may come from a stranger.
    target = tmp_path / "evil.txt"
    files = description.tokenizer | {f"../../../../../../{target}": "x", str(target): "x"}
    with pytest.raises(InputError, match="expected paths inside its folder"):
        Description("dpo", {}, {}, files).build_tokenizer()
    assert not target.exists()


def incomplete(run, tmp_path, remove):
    """Copies a step without some of its files."""
    folder = tmp_path / STEPS / "4"
    shutil.copytree(run / STEPS / "4", folder)
    for path in sorted(folder.glob(remove), reverse=True):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def test_a_step_without_parameters_is_not_a_checkpoint(run, tmp_path):
    assert find_checkpoint(incomplete(run, tmp_path, "params")) is None


@pytest.mark.parametrize("remove", ["description/*", "_CHECKPOINT_METADATA"])
def test_incomplete_descriptions_are_named(remove, run, tmp_path):
    folder = incomplete(run, tmp_path, remove)
    try:
        restored = read_description(folder)
    except InputError as error:
        assert f"{folder}: not a complete checkpoint" in str(error)
    else:  # Orbax may do without a file; what it then reads must be whole.
        assert remove == "_CHECKPOINT_METADATA" and restored.verb == "dpo"


def test_missing_parameters_are_named(run, tmp_path, one_device):
    folder = incomplete(run, tmp_path, "params/*")
    with pytest.raises(InputError, match="not a complete checkpoint"):
        load_model(folder, ComputeOptions(), one_device, MeshOptions())


def test_missing_data_files_are_named(run, tmp_path, one_device):
    folder = incomplete(run, tmp_path, "params/d/*")
    with pytest.raises(InputError, match="not a complete checkpoint"):
        load_model(folder, ComputeOptions(), one_device, MeshOptions())
