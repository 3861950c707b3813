"""The estimate against what the compiler says afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qstar_jax.config import ComputeOptions, LoraOptions, MeshOptions, OptimizerOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.losses import make_loss
from qstar_jax.models import CausalLM
from qstar_jax.sharding import make_mesh, tree_shardings
from qstar_jax.store.open import param_shardings
from qstar_jax.training import run as run_module
from qstar_jax.training.diagnostics.estimate import Estimate, device_memory, estimate
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.step import TrainState, make_train_step

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}  # activations and parameters alike


def zeros(x, sharding):
    return jax.device_put(np.zeros(x.shape, x.dtype), sharding)


@pytest.fixture(scope="module")
def stage(tiny_config, random_examples):
    """`stage(remat, rank, mesh)`: loss, state and batch of a step, and the mesh."""
    examples = random_examples(32, seed=1, length=64, response_length=24)

    def make(remat="none", rank=0, mesh_options=MeshOptions(data=1)):
        count = mesh_options.data * mesh_options.fsdp * mesh_options.tensor
        mesh = make_mesh(mesh_options, jax.devices()[:count])
        base = CausalLM.from_hf(tiny_config | WIDE, ComputeOptions(remat=remat, attention="dense"))
        model = base.with_lora(rank, 8.0) if rank else base
        optimizer = make_optimizer(OptimizerOptions(), 4)
        with jax.set_mesh(mesh):
            shardings = param_shardings(base, mesh, mesh_options)
            # What the numbers are does not matter here, and zeros need no compilation.
            params = jax.tree.map(zeros, base.abstract_params(), shardings)
            trained = jax.eval_shape(model.init_adapter, jax.random.key(1)) if rank else params
            trained = jax.tree.map(zeros, trained, tree_shardings(trained, mesh, mesh_options))
            abstract = jax.eval_shape(optimizer.init, trained)
            opt_state = jax.tree.map(zeros, abstract, tree_shardings(abstract, mesh, mesh_options))
        state = TrainState(jnp.int32(0), trained, opt_state, None if rank else params, params if rank else None)
        batch = make_batch(examples, Shapes.of(examples, "packed", batch_size=32, shards=count))
        return preference_loss_fn(model, make_loss()), optimizer, state, jax.tree.map(jnp.asarray, batch), mesh

    return make


@pytest.mark.thin("none-0")
@pytest.mark.parametrize(("remat", "rank"), [("none", 0), ("dots", 0), ("none", 4)])
def test_memory_is_near_that_of_the_compiled_step(remat, rank, stage):
    loss_fn, optimizer, state, batch, mesh = stage(remat, rank)
    needs = estimate(loss_fn, state, batch, mesh, flops=1.0, steps=1)
    assert needs.memory["activations"] > 0.2 * needs.total  # else this would test little
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0).lower(state, batch).compile()
    used = step.memory_analysis()
    compiled = used.temp_size_in_bytes + used.argument_size_in_bytes
    assert 0.6 * compiled < needs.total < 1.2 * compiled


def test_each_part_by_hand(stage):
    loss_fn, _, state, batch, mesh = stage()
    size = sum(x.nbytes for x in jax.tree.leaves(state.params))
    needs = estimate(loss_fn, state, batch, mesh, flops=1.0, steps=1).memory
    assert needs["policy"] == needs["reference"] == needs["gradients"] == size
    assert 2 * size <= needs["optimizer"] < 2.01 * size and not needs["state before the step"]
    several = estimate(loss_fn, state, batch, mesh, flops=1.0, steps=1, updates=2).memory
    assert several == needs | {"state before the step": size + needs["optimizer"]}
    lora_loss, _, lora_state, *_ = stage(rank=4)
    lora = estimate(lora_loss, lora_state, batch, mesh, flops=1.0, steps=1).memory
    adapter = sum(x.nbytes for x in jax.tree.leaves(lora_state.params))
    assert lora["policy"] == size + adapter and lora["reference"] == 0 and lora["gradients"] == adapter
    # The loss alone knows what is computed again; the state may stay.
    less = {
        remat: estimate(stage(remat)[0], state, batch, mesh, flops=1.0, steps=1).memory["activations"]
        for remat in ("dots", "attention", "full")
    }
    assert less["full"] < less["attention"] < less["dots"] < needs["activations"]


def test_devices_share_what_is_cut(stage):
    loss_fn, _, state, batch, mesh = stage()
    whole = estimate(loss_fn, state, batch, mesh, flops=1.0, steps=1).memory
    loss_fn, _, state, batch, mesh = stage(mesh_options=MeshOptions(data=2, fsdp=4, min_shard_size=64))
    part = estimate(loss_fn, state, batch, mesh, flops=1.0, steps=1).memory
    for name in ("policy", "reference", "optimizer"):
        assert whole[name] / 4 <= part[name] < whole[name] / 3.5  # norms are not cut
    assert part["activations"] < whole["activations"] / 5


def test_micro_batches_keep_less(stage):
    loss_fn, _, state, batch, mesh = stage()
    whole = estimate(loss_fn, state, batch, mesh, flops=1.0, steps=1).memory
    stacked = jax.tree.map(lambda x: jnp.stack([x[:1]] * 4), batch)
    micro = estimate(loss_fn, state, stacked, mesh, flops=1.0, steps=1, accumulate=4).memory
    assert micro["activations"] < 0.5 * whole["activations"] and micro["gradients"] == 2 * whole["gradients"]


def test_lines_for_the_terminal():
    memory = {"policy": 2_000_000_000, "reference": 0, "activations": 500_000_000}
    text = str(Estimate(memory, flops=3e12, steps=100, limit=24_000_000_000, peak_flops=1.5e11))
    assert text == (
        "estimate: at least 2.5 GB of 24.0 GB per device (policy 2.0 GB, activations 500.0 MB); "
        "3.00e+12 FLOPs per step: 20 s at the hardware's peak, 0:33:20 for 100 steps"
    )
    tight = str(Estimate(memory, flops=3e12, steps=100, limit=2_400_000_000))
    assert "may not fit" in tight and "compute.remat full" in tight and "peak" not in tight


def test_the_machine_has_memory():
    assert 2**28 < device_memory(jax.devices()[0]) * jax.local_device_count() < 2**46


@pytest.mark.thin("whole")
@pytest.mark.parametrize(
    "changes", [{}, {"lora": LoraOptions(rank=4), "train": {"accumulate": 4}}], ids=["whole", "adapter, micro-batches"]
)
def test_a_run_shows_it_before_it_compiles(changes, make_config, tmp_path, capsys, one_device_only, monkeypatch):
    monkeypatch.setattr(run_module, "estimate", estimate)  # which tests leave out elsewhere
    train = {"steps": 1, "reference_samples": 0} | changes.get("train", {})
    run_module.train(make_config(tmp_path / "run", **changes | {"train": train}), Console(width=400))
    printed = capsys.readouterr().out
    assert printed.index("estimate: at least") < printed.index("step 0/1")
    assert np.isfinite(float(printed.split("FLOPs per step")[0].split()[-1]))
