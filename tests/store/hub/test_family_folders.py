"""Folders of every family, out and in: transformers 5 and 4 read what is written here, and we what they write."""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import MeshOptions
from qstar_jax.models import CausalLM
from qstar_jax.store import hub
from qstar_jax.store.open import param_shardings

pytestmark = pytest.mark.parity

# What no family reads, in values that no class has by default.
UNUSED = {
    "_name_or_path": "owner/model",
    "use_cache": False,
    "initializer_range": 0.03,
    "summary_type": "last",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}

logits_of = jax.jit(CausalLM.logits, static_argnums=0)


@pytest.fixture(scope="session")
def export(open_family, tmp_path_factory, tiny_tokenizer):
    """`export(name)`: folder in which a family is written by us."""
    place = tmp_path_factory.mktemp("exports")

    def write(name):
        if not (place / name).exists():
            hub.write_folder(place / name, *open_family(name), tiny_tokenizer, "float32")
        return place / name

    return write


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_torch_reads_the_same_model(family, families, family_folder, export):
    expected = families.logits(family_folder(family))
    actual = families.logits(export(family))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_a_second_export_is_the_same_files(family, export, one_device, read_family, tiny_tokenizer, tmp_path):
    model, params = read_family(export(family))
    hub.write_folder(tmp_path, model, params, tiny_tokenizer, "float32")
    assert files_of(tmp_path) == files_of(export(family))


def test_unused_keys_of_config_json_are_written_again(family, family_folder, read_family, tiny_tokenizer, tmp_path):
    folder = shutil.copytree(family_folder(family), tmp_path / "model")
    config = hub.read_config(folder)
    inner = config.get("text_config", config)
    inner |= UNUSED
    (folder / "config.json").write_text(json.dumps(config))
    hub.write_folder(tmp_path / "out", *read_family(folder), tiny_tokenizer, "float32")
    written = hub.read_config(tmp_path / "out")
    assert {name: written.get(name) for name in UNUSED} == UNUSED


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_files_in_shards_and_in_bfloat16(family, families, family_folder, read_family, one_device, tmp_path):
    torch = pytest.importorskip("torch")
    oracle = families.open_torch(family_folder(family)).to(torch.bfloat16)
    oracle.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 2
    model, params = read_family(tmp_path)
    # The oracle is read anew: `.to(bfloat16)` has rounded the rotary frequencies too, which are no part of the file.
    actual, expected = logits_of(model, params, jnp.asarray(families.rows())), families.logits(tmp_path)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    # Stored in bfloat16, the values must be exactly those of the file.
    model = replace(model, compute=replace(model.compute, param_dtype="bfloat16"))
    params = hub.read_params(tmp_path, model, param_shardings(model, one_device, MeshOptions()))
    table = params["embed"]["embedding"]
    assert table.dtype == jnp.bfloat16
    stored = oracle.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(table, np.float32), stored)


def transformers_4(families, verb, place):
    """Lets the other Python write folders, or read those that are there; returns {family: logits}."""
    words = [os.environ["QSTAR_TRANSFORMERS4"], families.__file__, verb, str(place)]
    said = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert said.returncode == 0, said.stderr
    failures = [f"{path.stem}: {path.read_text()}" for path in place.glob("*.txt")]
    assert not failures, "\n".join(failures)
    return {name: np.load(place / f"{name}.npy") for name in families.FAMILIES}


needs_transformers_4 = pytest.mark.skipif(
    "QSTAR_TRANSFORMERS4" not in os.environ, reason="names a Python that has transformers 4 and torch"
)


@needs_transformers_4
@pytest.mark.slow
def test_transformers_4_reads_the_same_models(families, family_folder, export, tmp_path):
    for name in families.FAMILIES:
        (tmp_path / name).symlink_to(export(name))
    for name, actual in transformers_4(families, "read", tmp_path).items():
        expected = families.logits(family_folder(name))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5, err_msg=name)


@needs_transformers_4
@pytest.mark.slow
def test_what_transformers_4_writes_is_read(families, read_family, tmp_path):
    for name, expected in transformers_4(families, "write", tmp_path).items():
        actual = logits_of(*read_family(tmp_path / name), jnp.asarray(families.rows()))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * expected.std(), err_msg=name)
