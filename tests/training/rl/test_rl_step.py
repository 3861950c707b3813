"""The updates of a step, on a problem small enough to take them by hand."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax.training.rl.step import find_cause_of_update, make_rl_step
from qstar_jax.training.step import TrainState, make_train_step


def squares(params, ref_params, batch):
    """The sum of (x - target)^2, with a count."""
    values = (params["x"] - batch) ** 2
    one = jnp.ones(())
    metrics = {"loss": (values.sum(), jnp.float32(batch.size)), "count/numbers": (jnp.float32(batch.size), one)}
    return values.mean(), metrics


def start(optimizer=optax.sgd(0.1)):
    params = {"x": jnp.ones(())}
    return TrainState(jnp.int32(3), params, optimizer.init(params), finite=jnp.bool(True))


@pytest.mark.parametrize(
    ("epochs", "minibatches", "accumulate"), [(1, 1, 1), (3, 1, 1), (3, 1, 2), (2, 2, 1), (2, 2, 2)]
)
def test_every_minibatch_is_passed_in_order_in_every_epoch(epochs, minibatches, accumulate):
    batch = jnp.arange(8.0).reshape(minibatches * accumulate, -1)
    whole = batch[0] if len(batch) == 1 else batch
    update = make_train_step(squares, optax.sgd(0.1), accumulate=accumulate)
    step = make_rl_step(update, inner_epochs=epochs, minibatches=minibatches, accumulate=accumulate)
    state, metrics = jax.jit(step)(start(), whole)
    x, losses = 1.0, []
    for _ in range(epochs):
        for numbers in np.asarray(batch).reshape(minibatches, -1):
            losses.append(((x - numbers) ** 2).mean())
            x -= 0.1 * (2 * (x - numbers)).mean()
    np.testing.assert_allclose(state.params["x"], x, rtol=1e-5)
    assert int(state.step) == 4 and bool(state.finite)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], np.mean(losses), rtol=1e-5)
    assert metrics["count/numbers"][0] / metrics["count/numbers"][1] == 8 * epochs  # all that the step passed


def test_an_update_that_is_not_finite_leaves_the_state_before_the_step():
    optimizer = optax.adam(0.1)
    batch, begun = jnp.array([[1.0, 2.0], [jnp.nan, 1.0]]), start(optimizer)
    step = jax.jit(make_rl_step(make_train_step(squares, optimizer), inner_epochs=2, minibatches=2))
    state, _ = step(begun, batch)
    for _ in range(2):  # and nothing after it moves the state either
        assert not state.finite
        jax.tree.map(np.testing.assert_array_equal, replace(state, finite=begun.finite), begun)
        state, _ = step(state, jnp.ones((2, 2)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Numbers:
    """A batch with one number per prompt."""

    weights: jax.Array


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_update_that_is_not_finite_is_named_with_the_prompts_of_its_minibatch(accumulate):
    numbers = jnp.arange(12.0).reshape(-1, 2) if accumulate == 2 else jnp.arange(12.0).reshape(3, 4)

    def explode(params, ref_params, batch):  # from its second epoch on, the last of three minibatches is too much
        value, metrics = squares(params, ref_params, batch.weights)
        bad = jnp.where((params["x"] > 4) & (batch.weights >= 10), jnp.nan, 0.0)
        return value, metrics | {"loss": (metrics["loss"][0] + (params["x"] * bad).sum(), metrics["loss"][1])}

    update, seen = make_train_step(explode, optax.sgd(0.25), accumulate=accumulate), []

    def find_cause(state, part, locate):
        seen.append((float(state.params["x"]), np.asarray(part.weights).reshape(-1).tolist()))
        return f"it is in {locate([0, 3])}"

    passes = {"inner_epochs": 2, "minibatches": 3, "accumulate": accumulate}
    cause = find_cause_of_update(
        find_cause,
        update,
        replace(start(), finite=jnp.bool(False)),
        Numbers(numbers),
        lambda rows: f"rows {rows}",
        **passes,
    )
    assert cause == "in update 6 of 6, it is in rows [8, 11]"
    assert seen == [
        (4.734375, [8.0, 9.0, 10.0, 11.0])
    ]  # each update goes half the way to its mean; 3.375 in the first epoch
    fine = Numbers(jnp.zeros_like(numbers))
    assert find_cause_of_update(find_cause, update, start(), fine, str, **passes).startswith("each of its updates is")
