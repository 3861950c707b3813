import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import OptimizerOptions
from qstar_jax.errors import InputError
from qstar_jax.training.optimizers import make_optimizer

PARAMS = {
    "kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4),
    "norm": {"scale": jnp.array([1.0, 2.0])},
    "layers": {"q": {"bias": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, "q_norm": {"scale": jnp.array([[1.0], [2.0]])}},
}


def walk(steps=4, **options):
    """Parameters after some steps of fixed gradients at rate 0.1."""
    defaults = {"learning_rate": 0.1, "max_grad_norm": 0.0, "schedule": "constant"}
    optimizer = make_optimizer(OptimizerOptions(**defaults | options), steps)
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(steps):
        grads = jax.tree.map(lambda x, step=step: jnp.cos(3.0 * x + step), PARAMS)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def by_hand(update, state, steps=4, rate=0.1):
    kernel = np.asarray(PARAMS["kernel"], np.float64)
    params = kernel.copy()
    for step in range(steps):
        state, change = update(state, np.cos(3.0 * kernel + step), step + 1)
        params = params - rate * change
    return params


def test_rmsprop_is_torchs():
    def update(square, g, _):
        square = 0.99 * square + 0.01 * g**2
        return square, g / (np.sqrt(square) + 1e-8)

    np.testing.assert_allclose(walk(name="rmsprop")["kernel"], by_hand(update, 0.0), rtol=1e-5, atol=1e-6)


def test_adamw():
    def update(state, g, t):
        m, v = 0.9 * state[0] + 0.1 * g, 0.999 * state[1] + 0.001 * g**2
        return (m, v), m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)

    np.testing.assert_allclose(walk()["kernel"], by_hand(update, (0.0, 0.0)), rtol=1e-5, atol=1e-5)


def test_lion():
    def update(m, g, _):
        return 0.99 * m + 0.01 * g, np.sign(0.9 * m + 0.1 * g)

    np.testing.assert_allclose(walk(name="lion")["kernel"], by_hand(update, 0.0), rtol=1e-5)


def test_adafactor_steps_have_at_most_unit_size():
    change = walk(name="adafactor", steps=1)["kernel"] - PARAMS["kernel"]
    assert 0 < np.sqrt(np.mean(np.square(change))) <= 0.1 + 1e-6


@pytest.mark.parametrize("name", ["adamw", "lion", "rmsprop", "adafactor"])
def test_decay_is_decoupled_and_leaves_norms_and_biases_alone(name):
    plain, decayed = walk(1, name=name), walk(1, name=name, weight_decay=0.5)
    np.testing.assert_allclose(decayed["kernel"], plain["kernel"] - 0.1 * 0.5 * PARAMS["kernel"], rtol=1e-5, atol=1e-7)
    for part in ("norm", "layers"):
        jax.tree.map(np.testing.assert_array_equal, decayed[part], plain[part])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adamw", {"beta1": 0.5}),
        ("adamw", {"beta2": 0.5}),
        ("adamw", {"eps": 1.0}),
        ("lion", {"beta1": 0.5}),
        ("lion", {"beta2": 0.1}),
        ("rmsprop", {"decay": 0.5}),
        ("rmsprop", {"eps": 1.0}),
        ("adafactor", {"decay": 0.1}),
        ("rmsprop", {"max_grad_norm": 1e-9}),
    ],
    ids=str,
)
def test_every_option_changes_the_walk(name, change):
    assert np.abs(walk(name=name, **change)["kernel"] - walk(name=name)["kernel"]).max() > 1e-3


@pytest.mark.parametrize(("name", "option"), [("lion", "eps"), ("rmsprop", "beta1"), ("adamw", "decay")])
def test_an_option_of_another_optimizer_is_refused(name, option):
    with pytest.raises(InputError, match=rf"optimizer {name} has no {option} \(it belongs to"):
        make_optimizer(OptimizerOptions(name=name, **{option: 0.5}), 1)
