"""Runs of families that are unlike Llama, from a folder as others write it to an export that torch opens."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions
from qstar_jax.store import hub

pytestmark = pytest.mark.parity

UNUSED = {"_name_or_path": "owner/model", "initializer_range": 0.03, "summary_type": "last", "use_cache": False}


@pytest.mark.thin("gemma3_images")
@pytest.mark.parametrize("family", ["gemma3_images", "gpt2_hub", "phi3_long", "pythia"])
def test_a_run_keeps_what_its_model_is(
    family, families, family_folder, read_family, make_config, tiny_train, on_devices, tmp_path
):
    folder = shutil.copytree(family_folder(family), tmp_path / "model")
    config = hub.read_config(folder)
    inner = config.get("text_config", config)
    inner |= UNUSED
    (folder / "config.json").write_text(json.dumps(config))
    compute = ComputeOptions(longrope="long" if family == "phi3_long" else "auto")
    run = make_config(tmp_path / "run", compute=compute, train={"steps": 2}, optimizer={"learning_rate": 0.01})
    tiny_train(replace(run, model=str(folder)))
    with on_devices(1):
        assert main(["export", "--model", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    written = hub.read_config(tmp_path / "out")
    assert {name: written.get(name) for name in UNUSED} == UNUSED
    before, after = (families.logits(place) for place in (folder, tmp_path / "out"))
    assert np.abs(after - before).max() > 0.03  # it has learned something
    model, params = read_family(tmp_path / "out")
    logits = model.logits(params, jnp.asarray(families.rows()))
    np.testing.assert_allclose(logits, after, rtol=0, atol=1e-4 * after.std())
