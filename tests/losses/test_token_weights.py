"""Weights of tokens against loops over numbers, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses
from qstar_jax.losses import TOKEN_WEIGHTS, token_weights

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def guide():
    return 1.5 * jax.random.normal(jax.random.key(0), (40, 2, 9))


@pytest.fixture
def mask():
    """The first two pairs have a response of one token and one of none."""
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, (40, 2, 9)).at[..., 3].set(True)
    return mask.at[0, 0].set(jnp.arange(9) == 3).at[1, 1].set(False)


def place(values, value):
    return sorted(values).index(value)


LOOPS = {
    "exponential": lambda values, value, sign: np.exp(sign * min(max(sign * value, -0.5), 1.5)),
    "threshold": lambda values, value, sign: min(max(value, -1.0), 1.0),
    "threshold_and_scale": lambda values, value, sign: 0.7 + (min(max(value, -1.5), 1.5) + 1.5) * 0.6 / 3.0,
    "rank_based": lambda values, value, sign: (
        1.0 if len(values) == 1 else 0.7 + place(values, value) / (len(values) - 1) * 0.6
    ),
    "select": lambda values, value, sign: float(
        len(values) - 1 - place(values, value) < max(int(len(values) * 30 / 100), 1)
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_weights_are_those_of_a_loop_over_tokens(name, guide, mask):
    """`values` are the signed log-ratios of a response: as they are in the chosen, negated in the rejected one."""
    found = TOKEN_WEIGHTS[name](guide, mask)
    expected = np.zeros(mask.shape)
    for pair, response in np.ndindex(mask.shape[:2]):
        sign = 1.0 if response == 0 else -1.0
        places = np.flatnonzero(mask[pair, response])
        values = [sign * float(guide[pair, response, t]) for t in places]
        for t, value in zip(places, values, strict=True):
            expected[pair, response, t] = LOOPS[name](values, value, sign)
    np.testing.assert_allclose(found, expected, **EXACT)
    assert len(np.unique(found)) > (1 if name == "select" else 20 if name != "rank_based" else 5)


@pytest.mark.parametrize("name", sorted(set(TOKEN_WEIGHTS) - {"random"}))
def test_good_tokens_of_the_chosen_and_bad_tokens_of_the_rejected_count(name):
    guide, mask = jnp.array([[[2.0, -2.0, 0.0], [2.0, -2.0, 0.0]]]), jnp.ones((1, 2, 3), bool)
    ((chosen, rejected),) = TOKEN_WEIGHTS[name](guide, mask)
    assert chosen[0] > chosen[1] and rejected[0] < rejected[1]


OPTIONS = {
    "exponential": {"low": -0.1, "high": 0.3, "sharpness": 2.0},
    "threshold": {"low": -0.2, "high": 0.4},
    "threshold_and_scale": {"low": -0.5, "high": 0.6, "min_weight": 0.1, "max_weight": 2.0},
    "rank_based": {"min_weight": 0.1, "max_weight": 2.0},
    "select": {"top": 0.6},
    "random": {"min_weight": 0.1, "max_weight": 2.0, "control_seed": 1},
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIONS for option in OPTIONS[name]])
def test_every_option_changes_the_weights(name, option, guide, mask):
    changed = TOKEN_WEIGHTS[name](guide, mask, **{option: OPTIONS[name][option]})
    assert np.abs(changed - TOKEN_WEIGHTS[name](guide, mask)).max() > 0.01


def test_the_share_that_is_selected_is_exact():
    mask = jnp.arange(50) < jnp.arange(1, 51)[:, None, None]
    mask = jnp.broadcast_to(mask, (50, 2, 50))
    guide = jax.random.normal(jax.random.key(2), mask.shape)
    found = token_weights.select(guide, mask, top=0.3).sum(-1)
    expected = [max(3 * length // 10, 1) for length in range(1, 51)]
    np.testing.assert_array_equal(found, np.stack([expected, expected], -1))


def test_random_weights_are_uniform_and_know_nothing_of_the_guide(guide, mask):
    found = np.asarray(token_weights.random(guide, mask))[np.asarray(mask)]
    assert 0.7 <= found.min() < 0.71 and 1.29 < found.max() <= 1.3 and abs(found.mean() - 1) < 0.02
    assert abs(np.corrcoef(found, np.asarray(guide)[np.asarray(mask)])[0, 1]) < 0.1
    ranked = np.asarray(token_weights.rank_based(guide, mask))[np.asarray(mask)]
    assert abs(found.std() - ranked.std()) < 0.03  # the spread is that of `rank_based`


def test_random_weights_stay_with_their_response(guide, mask):
    """In any batch, on any device, and however long the batch's arrays are."""
    found = token_weights.random(guide, mask)
    order = jax.random.permutation(jax.random.key(3), len(guide))
    wider = [jnp.pad(x[order], ((0, 0), (0, 0), (0, 4))) for x in (guide, mask)]
    np.testing.assert_array_equal(jax.jit(token_weights.random)(*wider)[..., :9], found[order])


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_weights_are_zero_under_the_mask_and_pass_no_gradient(name, guide, mask):
    dirty = jnp.where(mask, guide, jnp.nan)
    found = TOKEN_WEIGHTS[name](dirty, mask)
    np.testing.assert_array_equal(found, TOKEN_WEIGHTS[name](guide, mask))
    assert not np.any(np.where(mask, 0, found))
    ratios = jnp.ones(mask.shape)
    gradient = jax.grad(lambda g: losses.weighted_sigmoid(ratios, mask, TOKEN_WEIGHTS[name](g, mask))[0].sum())(guide)
    np.testing.assert_array_equal(gradient, 0)


def test_weights_of_one_are_dpo(guide, mask):
    found, metrics = losses.weighted_sigmoid(guide, mask, jnp.ones(mask.shape), beta=0.3)
    expected, same = losses.sigmoid(guide, mask, beta=0.3)
    np.testing.assert_allclose(found, expected, **EXACT)
    np.testing.assert_allclose(metrics.rewards, same.rewards, **EXACT)
