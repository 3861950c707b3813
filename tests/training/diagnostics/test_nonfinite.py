"""Runs that become non-finite: the cause is named, and the last good state kept."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import OptimizerOptions, ReferenceOptions
from qstar_jax.data.batches import step_indices
from qstar_jax.data.feeder import Feeder
from qstar_jax.losses import make_loss
from qstar_jax.store.checkpoints import find_checkpoint
from qstar_jax.training.diagnostics.nonfinite import find_cause
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.step import TrainState, first_nonfinite, make_train_step

STEP = 2  # the runs of this folder save at every second step
ROW = int(step_indices(0, STEP, 40, 8)[2])  # of the 40 in the training file: no earlier step has it


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory, make_config, tiny_train):
    out = tmp_path_factory.mktemp("whole")
    tiny_train(make_config(out, train={"keep_checkpoints": 9}))
    return out


@pytest.mark.thin("1")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_poisoned_row_is_named_and_the_state_before_it_kept(
    accumulate, dpo_run, make_config, tiny_train, tmp_path, monkeypatch, arrays_of
):
    real = Feeder.with_reference

    def poisoned(self, ref_logps):
        broken = [[np.full_like(x, np.nan) for x in logps] if i == ROW else logps for i, logps in enumerate(ref_logps)]
        return real(self, broken)

    monkeypatch.setattr(Feeder, "with_reference", poisoned)
    reference = ReferenceOptions(mode="cached", cache=str(tmp_path / "cache"))
    train = {"accumulate": accumulate, "log_every": 10, "save_every": 0, "reference_samples": 0}
    config = make_config(tmp_path / "run", reference=reference, train=train)
    message = (
        rf"step {STEP} of .*loss nan.*: log pi_ref is not finite in row {ROW + 1}; .*checkpoint {STEP}, from which"
    )
    with pytest.raises(FloatingPointError, match=message):
        tiny_train(config)
    assert find_checkpoint(tmp_path / "run").name == str(STEP)
    # What is kept equals the state of a whole run at that step.
    shutil.copytree(dpo_run / "checkpoints" / str(STEP), tmp_path / "good" / "checkpoints" / str(STEP))
    kept, good = (jax.tree.leaves(arrays_of(folder)) for folder in (tmp_path / "run", tmp_path / "good"))
    for a, b in zip(kept, good, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # other programs: cached or live, whole or in parts


def test_a_gradient_is_named_by_its_first_bad_tensor(make_config, tiny_train, tmp_path, monkeypatch):
    def make_broken(model, loss, weigh=None):
        loss_fn = preference_loss_fn(model, loss, weigh)

        def broken(params, ref_params, batch):
            loss, metrics = loss_fn(params, ref_params, batch)
            zero = params["layers"]["mlp"]["up"]["kernel"][0, 0, 0] * 0
            total, pairs = metrics["loss"]
            return loss, metrics | {"loss": (total + jnp.sqrt(zero), pairs)}  # value 0, gradient NaN

        return broken

    monkeypatch.setattr("qstar_jax.training.objectives.preference.preference_loss_fn", make_broken)
    message = r"step 0 of .*gradient of layers/mlp/up/kernel is not finite, first in a batch of rows \d+, .*untouched"
    with pytest.raises(FloatingPointError, match=message):
        tiny_train(make_config(tmp_path / "run", train={"reference_samples": 0}))
    assert find_checkpoint(tmp_path / "run") is None


@pytest.mark.filterwarnings("ignore:overflow")
def test_parameters_that_are_not_finite_are_named_and_never_saved(make_config, tiny_train, tmp_path):
    optimizer = OptimizerOptions(learning_rate=1e39, schedule="constant")
    config = make_config(tmp_path / "run", optimizer=optimizer, train={"reference_samples": 0, "save_every": 0})
    with pytest.raises(FloatingPointError, match=r"step 1 of .*the parameter embed/embedding is not finite"):
        tiny_train(config)
    assert find_checkpoint(tmp_path / "run") is None


def test_parameters_and_log_probabilities_are_named(tiny_model, tiny_params, pair_batch):
    batch, loss_fn = pair_batch(4), preference_loss_fn(tiny_model, make_loss())
    rows = ["4", "2", "5", "1"]
    locate = lambda examples: f"rows {', '.join(rows[i] for i in examples)}"  # noqa: E731
    cause = partial(find_cause, tiny_model, loss_fn, batch=batch, locate=locate)
    reference = jax.tree.map(lambda x: x * jnp.nan, tiny_params)
    assert cause(TrainState(jnp.int32(0), tiny_params, (), reference)) == (
        "the reference's parameter embed/embedding is not finite"
    )
    huge = tiny_params | {"unembed": {"embedding": tiny_params["unembed"]["embedding"].at[:].set(3e38)}}
    message = cause(TrainState(jnp.int32(0), huge, (), tiny_params))
    assert message == "log pi is not finite in rows 4, 2, 5, 1"
    assert first_nonfinite(tiny_params) is None and first_nonfinite(None) is None


def test_after_a_bad_step_nothing_moves(tiny_model, tiny_params, pair_batch):
    """One bad batch, then good ones: state and step stay what they were before it."""
    import optax

    def loss_fn(params, ref_params, batch):
        total = (params["norm"]["scale"] * batch).sum()
        return total, {"loss": (total, jnp.ones(()))}

    params = {"norm": {"scale": jnp.ones(3)}}
    step = jax.jit(make_train_step(loss_fn, optax.adam(0.1), sync_every=1))
    state = TrainState(jnp.int32(0), params, optax.adam(0.1).init(params), params)
    state, _ = step(state, jnp.ones(()))
    before = state
    for value in (jnp.inf, 1.0, 2.0):
        state, _ = step(state, jnp.float32(value))
    assert not state.finite and state.step == 1
    kept = (state.params, state.opt_state, state.ref_params)
    jax.tree.map(np.testing.assert_array_equal, kept, (before.params, before.opt_state, before.ref_params))


def test_a_reference_moves_by_its_mix(tiny_params):
    import optax

    def loss_fn(params, ref_params, batch):
        total = (params["x"] * batch).sum()
        return total, {"loss": (total, jnp.ones(()))}

    step = jax.jit(make_train_step(loss_fn, optax.sgd(1.0), sync_every=2, sync_mix=0.25))
    start = {"x": jnp.zeros(2)}
    state = TrainState(jnp.int32(0), start, optax.sgd(1.0).init(start), {"x": jnp.full(2, 8.0)})
    references = []
    for _ in range(4):
        state, _ = step(state, jnp.ones(()))
        references.append(float(state.ref_params["x"][0]))
    # The policy is at -1, -2, -3, -4.
    assert references == [8.0, 0.75 * 8 - 0.25 * 2, 5.5, 0.75 * 5.5 - 0.25 * 4]
