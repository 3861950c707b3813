"""The updates of a step, on a problem small enough to take them by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax.training.rl.step import make_rl_step
from qstar_jax.training.step import TrainState, make_train_step


def squares(params, ref_params, batch):
    """The sum of (x - target)^2, with a count."""
    values = (params["x"] - batch) ** 2
    one = jnp.ones(())
    metrics = {"loss": (values.sum(), jnp.float32(batch.size)), "count/numbers": (jnp.float32(batch.size), one)}
    return values.mean(), metrics


def start():
    return TrainState(jnp.int32(3), {"x": jnp.ones(())}, optax.sgd(0.1).init({"x": jnp.ones(())}))


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


def test_an_update_that_is_not_finite_ends_the_step():
    batch = jnp.array([[1.0, 2.0], [jnp.nan, 1.0]])
    step = make_rl_step(make_train_step(squares, optax.sgd(0.1)), inner_epochs=2, minibatches=2)
    state, _ = step(start(), batch)
    assert int(state.step) == 3 and not state.finite and np.isfinite(state.params["x"])
