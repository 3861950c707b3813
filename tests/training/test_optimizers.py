import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax.config import OptimizerOptions
from qstar_jax.config.variants import declarations
from qstar_jax.errors import InputError
from qstar_jax.training.optimizers import learning_rate_schedule, make_optimizer

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "lion", "eps": 1e-8},
            "eps 1e-08 has no effect with name lion; adamw and rmsprop read it: set --optimizer.name adamw, or leave "
            "it out",
        ),
        (
            {"name": "rmsprop", "beta1": 0.5},
            "beta1 0.5 has no effect with name rmsprop; adamw and lion read it: set --optimizer.name adamw, or leave "
            "it out",
        ),
        (
            {"name": "adamw", "decay": 0.5},
            "decay 0.5 has no effect with name adamw; rmsprop and adafactor read it: set --optimizer.name rmsprop, or "
            "leave it out",
        ),
        ({"beta2": 1.0}, "beta2 is 1.0; expected a number in [0, 1)"),
        ({"name": "adam"}, "name 'adam' is unknown; choose from adamw, lion, adafactor, rmsprop"),
    ],
)
def test_an_option_of_another_optimizer_is_refused(options, message):
    with pytest.raises(InputError) as error:
        make_optimizer(OptimizerOptions(**options), 1)
    assert str(error.value) == f"optimizer: {message}"


DECLARED = declarations(OptimizerOptions)


@pytest.mark.parametrize("name", ["adamw", "lion", "rmsprop", "adafactor"])
def test_every_option_that_an_optimizer_does_not_read_is_refused(name):
    unread = [option for option, declaration in DECLARED.items() if name not in declaration.defaults]
    assert unread
    for option in unread:
        with pytest.raises(InputError, match=f"optimizer: {option} 0.5 has no effect with name {name};"):
            make_optimizer(OptimizerOptions(name=name, **{option: 0.5}), 1)


@pytest.mark.parametrize("name", ["adamw", "lion", "rmsprop", "adafactor"])
def test_defaults_are_what_is_used_where_nothing_is_given(name):
    defaults = {option: d.defaults[name] for option, d in DECLARED.items() if name in d.defaults}
    jax.tree.map(np.testing.assert_array_equal, walk(name=name), walk(name=name, **defaults))


def rates(steps=10, **options):
    schedule = learning_rate_schedule(OptimizerOptions(learning_rate=1.0, **options), steps)
    return [round(float(schedule(step)), 6) for step in range(steps)]


def test_schedules_by_hand():
    assert rates(schedule="constant") == [1.0] * 10
    assert rates(schedule="linear") == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    cosine = [round(0.5 * (1 + math.cos(math.pi * step / 10)), 6) for step in range(10)]
    np.testing.assert_allclose(rates(schedule="cosine"), cosine, atol=2e-6)
    # The first of four warm-up steps has a quarter of the rate already, the last one all of it.
    assert rates(schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 7
    linear = [0.25, 0.5, 0.75, 1.0, *[1 - i / 6 for i in range(6)]]
    np.testing.assert_allclose(rates(schedule="linear", warmup_steps=4), linear, atol=2e-6)
    assert rates(schedule="constant", warmup_steps=1) == [1.0] * 10
    assert rates(warmup_steps=0.3) == rates(warmup_steps=3) and rates(warmup_steps=0.31) == rates(warmup_steps=4)
    np.testing.assert_allclose(rates(steps=3, warmup_steps=6), [1 / 6, 2 / 6, 3 / 6], atol=2e-6)


def descend(**options):
    """Parameters after three of six steps down a bowl."""
    optimizer = make_optimizer(OptimizerOptions(**{"learning_rate": 0.1, **options}), 6)
    params = {"kernel": jnp.array([1.0, -2.0]), "norm": {"scale": jnp.array([3.0])}}
    state = optimizer.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda x: (2 + step) * x + 0.1, params)  # noqa: B023
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.2},
        {"warmup_steps": 3},
        {"schedule": "constant"},
        {"schedule": "cosine"},
        {"weight_decay": 0.1},
        {"beta1": 0.5},
        {"beta2": 0.9},
        {"eps": 0.1},
        {"max_grad_norm": 0.01, "eps": 0.1},
    ],
    ids=str,
)
def test_options_of_the_optimizer_change_the_descent(change):
    plain = descend(**{"eps": 0.1} if "max_grad_norm" in change else {})
    assert np.abs(np.asarray(descend(**change)["kernel"]) - plain["kernel"]).max() > 1e-4


def test_norms_do_not_decay():
    plain, decayed = (
        descend(weight_decay=decay, max_grad_norm=0.0) for decay in (0.0, 0.5)
    )  # clipping would couple them
    np.testing.assert_array_equal(plain["norm"]["scale"], decayed["norm"]["scale"])
    assert (np.abs(decayed["kernel"]) < np.abs(plain["kernel"])).all()


def test_clipping_by_hand():
    optimizer = make_optimizer(OptimizerOptions(max_grad_norm=1.0, beta1=0.0), 1)
    grads = {"kernel": jnp.array([3.0, 4.0])}
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    mu = optax.tree.get(state, "mu")["kernel"]
    np.testing.assert_allclose(mu, [0.6, 0.8], rtol=1e-6)
    unclipped = make_optimizer(OptimizerOptions(max_grad_norm=0.0, beta1=0.0), 1)
    _, state = unclipped.update(grads, unclipped.init(grads), grads)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["kernel"], [3.0, 4.0])
