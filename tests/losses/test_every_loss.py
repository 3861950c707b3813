"""What every loss keeps to: its formula, restated in numpy, its gradient, mask and options."""

import inspect
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qstar_jax import losses
from qstar_jax.errors import InputError

# A value of each option that is not the default of any loss, and what must be set for it to matter.
CHANGED = {
    "beta": 0.37,
    "label_smoothing": 0.2,
    "divergence": losses.js_divergence,
    "tau": 0.4,
    "penalty": 3.0,
    "shift": 0.5,
    "desirable_weight": 1.7,
    "undesirable_weight": 0.6,
    "normalize": "answer_tokens",
    "gamma": 1.3,
    "nll_weight": 0.4,
    "odds_weight": 0.7,
    "bias": 0.8,
    "discount": 0.6,
    "bc_weight": 0.3,
    "bc_data": "chosen",
    "alpha": 1.4,
    "value_beta": 0.8,
}
NEEDS = {"bc_data": {"bc_weight": 0.3}}
# A batch's tokens weigh its rows, so rows alone give another number.
UNCOUPLED = {name: {"normalize": "answer_tokens"} for name in ("sft", "cpo", "orpo")}
TRANSPORT = ("aot", "aot_unpaired")
TOKENS = {"log_ratios", "logp", "ref_logp", "kl", "guide_rewards", "weights", "turns", "mask"}  # arrays [..., T]
RETURNS = ["rewards", "reference_rewards"]
STOPPED = {
    "kto": ["baseline"],
    "tgdpo": ["guide_rewards"],
    "weighted_sigmoid": ["weights"],
    "a_star": RETURNS,
    "qrpo": RETURNS,
}
GARBAGE = [np.nan, np.inf, -np.inf, 1e30, np.nan]
NAMES = list(losses.LOSSES)


def make_arrays(seed, rows=4, responses=2, length=4, empty=False):
    """Numpy arrays in float64; masks have holes, and no empty response unless asked for."""
    rng = np.random.default_rng(seed)
    shape = (rows, responses, length)
    mask = rng.random(shape) < 0.7
    mask[..., 1] = True
    if empty:  # chosen, rejected, both
        mask[0, 0] = mask[1, 1] = mask[2] = False
    return {
        "log_ratios": rng.normal(size=shape),
        "logp": -0.05 - rng.exponential(size=shape),
        "ref_logp": -0.05 - rng.exponential(size=shape),
        "kl": rng.exponential(size=shape),
        "guide_rewards": rng.normal(size=shape),
        "weights": rng.normal(1.0, 0.5, size=shape),
        "turns": np.cumsum(rng.random(shape) < 0.5, axis=-1),
        "mask": mask,
        "labels": rng.permuted(np.arange(rows * responses) % 2 == 0).reshape(rows, responses),
        "baseline": np.asarray(0.3),
        "rewards": rng.normal(size=shape[:2]),
        "reference_rewards": np.where(
            np.arange(6) < rng.integers(1, 7, (*shape[:2], 1)), rng.normal(size=(*shape[:2], 6)), np.nan
        ),
    }


def read(name, arrays, dtype=None):
    """The arrays that the loss takes, as jax arrays."""
    parameters = inspect.signature(losses.LOSSES[name]).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    taken = {name: jnp.asarray(arrays[name]) for name in names}
    return taken | {n: x.astype(dtype or x.dtype) for n, x in floats(taken).items()}


def floats(arrays):
    return {name: x for name, x in arrays.items() if np.issubdtype(x.dtype, np.floating)}


def options_of(name):
    return [p.name for p in inspect.signature(losses.LOSSES[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]


def value_and_grads(name, arrays, **options):
    """Unreduced loss, and the gradient of a sum in which each row has its own weight."""
    fixed = {n: x for n, x in arrays.items() if n not in floats(arrays)}

    def total(differentiated):
        loss, _ = losses.LOSSES[name](**fixed, **differentiated, **options)
        return (loss * jnp.arange(1.0, loss.size + 1).reshape(loss.shape)).sum(), loss

    function = jax.value_and_grad(total, has_aux=True)
    if name == "plackett_luce":  # whose scan has many steps, which would be compiled one by one
        function = jax.jit(function)
    (_, loss), grads = function(floats(arrays))
    return loss, grads


# --- the formulas again, in numpy, token by token; each returns (loss, rewards)


def sums(values, mask):
    out = np.zeros(values.shape[:-1])
    for index in np.ndindex(out.shape):
        for value, own in zip(values[index], mask[index], strict=True):
            if own:
                out[index] += value
    return out


def lengths(mask):
    return np.maximum(sums(np.ones(mask.shape), mask), 1)


def log_sigma(x):
    return -np.logaddexp(0, -x)


def sigma(x):
    return np.exp(log_sigma(x))


def logistic(margin, eps=0.0):
    return -(1 - eps) * log_sigma(margin) - eps * log_sigma(-margin)


F_PRIME = {
    "reverse_kl": np.log,
    "forward_kl": lambda u: 1 - 1 / u,
    "js_divergence": lambda u: np.log(2 * u / (1 + u)),
    "alpha_divergence": lambda u: (u**-0.5 - 1) / -0.5,
}


def of_scores(formula, norm=False, **defaults):
    """A loss of f'(pi / pi_ref) of the two responses."""

    def restated(a, **options):
        given = {"beta": 0.1, "divergence": losses.reverse_kl} | defaults | options
        total = sums(a.log_ratios, a.mask)
        scores = F_PRIME[given.pop("divergence").__name__](np.exp(total))
        if norm:
            scores = scores / lengths(a.mask)
        return formula(scores[:, 0], scores[:, 1], **given), given["beta"] * total

    return restated


def of_sums(formula, beta=0.1, **defaults):
    def restated(a, **options):
        given = {"beta": beta} | defaults | options
        total = sums(a.log_ratios, a.mask)
        return formula(total[:, 0], total[:, 1], **given), given["beta"] * total

    return restated


def exo(c, r, beta, label_smoothing):
    loss = 0
    normalizer = np.exp(beta * c) + np.exp(beta * r)
    for score, target in ((c, 1 - label_smoothing), (r, label_smoothing)):
        p = np.exp(beta * score) / normalizer
        loss = loss + p * np.log(p / target)
    return loss


def discopop(c, r, beta, tau):
    m = beta * (c - r)
    return (1 - sigma(m / tau)) * -log_sigma(m) + sigma(m / tau) * np.exp(-m)


def robust(c, r, beta, label_smoothing):
    eps, m = label_smoothing, beta * (c - r)
    return (-(1 - eps) * log_sigma(m) + eps * log_sigma(-m)) / (1 - 2 * eps)


def kto(a, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    total = sums(a.log_ratios, a.mask)
    up = desirable_weight * (1 - sigma(beta * (total - a.baseline)))
    down = undesirable_weight * (1 - sigma(beta * (a.baseline - total)))
    return np.where(a.labels, up, down), beta * total


def implicit_prm(a, beta=0.05):
    x = beta * sums(a.log_ratios, a.mask)
    return np.where(a.labels, -np.log(sigma(x)), -np.log(1 - sigma(x))), x


def a_star(a, beta=1e-3, value_beta=0.5):
    x = beta * sums(a.log_ratios, a.mask)
    value = value_beta * np.log(np.nanmean(np.exp(a.reference_rewards / value_beta), -1))
    return (x - a.rewards + value) ** 2, x


def qrpo(a, beta=0.1):
    x, loss = beta * sums(a.log_ratios, a.mask), np.zeros(a.rewards.shape)
    for index in np.ndindex(loss.shape):
        others = [r for r in a.reference_rewards[index] if not np.isnan(r)]
        quantile = sum(r <= a.rewards[index] for r in others) / len(others)
        loss[index] = (quantile - beta * np.log(beta * (np.exp(1 / beta) - 1)) - x[index]) ** 2
    return loss, x


def quantile_losses(values, others, mask, beta, eps):
    """Sorted against sorted, over the rows that have tokens, and put back in their places."""
    present = [row for row in range(len(mask)) if mask[row].any()]
    loss = np.full(len(mask), np.log(2))
    others = sorted(others[row] for row in present)
    for other, row in zip(others, sorted(present, key=lambda row: values[row]), strict=True):
        loss[row] = logistic(beta * (values[row] - other), eps)
    return loss


def aot(a, beta=0.1, label_smoothing=0.0):
    own, ref = sums(a.logp, a.mask), sums(a.ref_logp, a.mask)
    loss = quantile_losses(own[:, 0] - own[:, 1], ref[:, 0] - ref[:, 1], a.mask, beta, label_smoothing)
    return loss, beta * (own - ref)


def aot_unpaired(a, beta=0.1, label_smoothing=0.0):
    total = sums(a.log_ratios, a.mask)
    return quantile_losses(total[:, 0], total[:, 1], a.mask, beta, label_smoothing), beta * total


def nll(a, normalize):
    chosen, mask = sums(a.logp, a.mask)[:, 0], a.mask[:, 0]
    if normalize == "answer_tokens":
        return -chosen / lengths(mask)
    responses = sum(1 for row in mask if row.any())
    return -chosen * responses / max(mask.sum(), 1) if normalize == "batch_tokens" else -chosen


def sft(a, normalize="batch_tokens"):
    return nll(a, normalize), sums(a.logp, a.mask)


def simpo(a, beta=2.0, gamma=0.5, label_smoothing=0.0):
    means = sums(a.logp, a.mask) / lengths(a.mask)
    return logistic(beta * (means[:, 0] - means[:, 1]) - gamma, label_smoothing), beta * means


def cpo(a, beta=0.1, label_smoothing=0.0, nll_weight=1.0, normalize="batch_tokens"):
    x = beta * sums(a.logp, a.mask)
    return logistic(x[:, 0] - x[:, 1], label_smoothing) + nll_weight * nll(a, normalize), x


def orpo(a, odds_weight=0.1, normalize="batch_tokens"):
    means = sums(a.logp, a.mask) / lengths(a.mask)
    p = np.exp(np.minimum(means, -1e-6))
    odds = p / (1 - p)
    loss = nll(a, normalize) - odds_weight * np.log(sigma(np.log(odds[:, 0] / odds[:, 1])))
    return loss, odds_weight * means


def cpl(a, beta=0.1, bias=0.5, discount=1.0, bc_weight=0.0, bc_data="all"):
    advantage = np.zeros(a.mask.shape[:-1])
    for index in np.ndindex(advantage.shape):
        time = 0
        for value, own in zip(a.logp[index], a.mask[index], strict=True):
            if own:
                advantage[index] += discount**time * beta * value
                time += 1
    cloned = slice(0, 2 if bc_data == "all" else 1)
    cloning = -sums(a.logp, a.mask)[:, cloned].sum(1) / np.maximum(a.mask[:, cloned].sum((1, 2)), 1)
    return logistic(advantage[:, 0] - bias * advantage[:, 1]) + bc_weight * cloning, advantage


def tdpo(a, beta=0.1, alpha=1.0):
    total, kl = sums(a.log_ratios, a.mask), sums(a.kl, a.mask)
    return logistic(beta * (total[:, 0] - total[:, 1] - alpha * (kl[:, 1] - kl[:, 0]))), beta * total


def tgdpo(a, beta=0.1, alpha=0.5):
    chosen = sums(beta * (1 + alpha * a.guide_rewards) * a.log_ratios, a.mask)[:, 0]
    rejected = sums(beta * (1 - alpha * a.guide_rewards) * a.log_ratios, a.mask)[:, 1]
    return logistic(chosen - rejected), beta * sums(a.log_ratios, a.mask)


def weighted_sigmoid(a, beta=0.1):
    weighted = sums(a.weights * a.log_ratios, a.mask)
    return logistic(beta * (weighted[:, 0] - weighted[:, 1])), beta * sums(a.log_ratios, a.mask)


def dmpo(a, beta=0.1, discount=0.7):
    """Turn by turn: phi is the share of turn j and those after it in the sum of gamma^j; gamma = 1 is no exception."""
    total = np.zeros(a.mask.shape[:-1])
    for index in np.ndindex(total.shape):
        own = a.mask[index]
        count = max(a.turns[index][own], default=0) + 1
        masses = [discount**turn for turn in range(count)]
        for turn in range(count):
            ratio = sum(a.log_ratios[index][own & (a.turns[index] == turn)])
            total[index] += sum(masses[turn:]) / sum(masses) * ratio
    return logistic(beta * (total[:, 0] - total[:, 1])), beta * sums(a.log_ratios, a.mask)


def plackett_luce(a, beta=0.1):
    u = beta * sums(a.log_ratios, a.mask)
    loss = np.zeros(len(u))
    for place in range(u.shape[1]):
        loss -= np.log(np.exp(u[:, place]) / np.exp(u[:, place:]).sum(1))
    return loss, u


RESTATED = {
    "sigmoid": of_scores(
        lambda c, r, beta, label_smoothing: logistic(beta * (c - r), label_smoothing), label_smoothing=0
    ),
    "sigmoid_norm": of_scores(lambda c, r, beta: logistic(beta * (c - r)), norm=True),
    "robust": of_scores(robust, label_smoothing=0.1),
    "hinge": of_scores(lambda c, r, beta: np.maximum(0, 1 - beta * (c - r))),
    "ipo": of_scores(lambda c, r, beta: (c - r - 1 / (2 * beta)) ** 2, norm=True),
    "ipo_sum": of_scores(lambda c, r, beta: (c - r - 1 / (2 * beta)) ** 2),
    "exo_pair": of_scores(exo, label_smoothing=1e-3),
    "discopop": of_scores(discopop, tau=0.05),
    "dpop": of_sums(
        lambda c, r, beta, penalty: logistic(beta * (c - r - penalty * np.maximum(0, -c))), beta=0.3, penalty=50
    ),
    "dpo_shift": of_sums(lambda c, r, beta, shift: logistic(beta * (c - shift * r)), shift=0.75),
    "nca_pair": of_sums(lambda c, r, beta: -log_sigma(beta * c) - log_sigma(-beta * c) / 2 - log_sigma(-beta * r) / 2),
    "bco_pair": of_sums(lambda c, r, beta: -log_sigma(beta * c) - log_sigma(-beta * r)),
    "sppo_hard": of_sums(lambda c, r, beta: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2),
    "apo_zero": of_sums(lambda c, r, beta: 1 - sigma(beta * c) + sigma(beta * r)),
    "apo_down": of_sums(lambda c, r, beta: sigma(beta * c) + 1 - sigma(beta * (c - r))),
    "kto": kto,
    "implicit_prm": implicit_prm,
    "a_star": a_star,
    "qrpo": qrpo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "sft": sft,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "cpl": cpl,
    "dmpo": dmpo,
    "tdpo1": tdpo,
    "tdpo2": partial(tdpo, alpha=0.5),
    "tgdpo": tgdpo,
    "weighted_sigmoid": weighted_sigmoid,
    "plackett_luce": plackett_luce,
}


def restate(name, arrays, **options):
    return RESTATED[name](SimpleNamespace(**arrays), **options)


def all_changed(name):
    return {option: CHANGED[option] for option in options_of(name)}


def test_tables_are_complete():
    assert set(RESTATED) == set(losses.LOSSES)
    assert set(CHANGED) == {option for name in NAMES for option in options_of(name)}
    for name in NAMES:
        assert set(options_of(name)) <= set(CHANGED), name


@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "changed"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_restatement(name, changed):
    options = all_changed(name) if changed else {}
    for seed in range(3):
        arrays = make_arrays(seed, responses=3 if name == "plackett_luce" else 2, empty=seed == 2)
        loss, rewards = restate(name, arrays, **options)
        with jax.enable_x64(True):
            found, metrics = losses.LOSSES[name](**read(name, arrays), **options)
            assert found.dtype == metrics.rewards.dtype == jnp.float64
        np.testing.assert_allclose(found, loss, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(metrics.rewards, rewards, rtol=1e-10, atol=1e-13)
        found, metrics = losses.LOSSES[name](**read(name, arrays, jnp.float32), **options)
        assert found.dtype == metrics.rewards.dtype == jnp.float32
        np.testing.assert_allclose(found, loss, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics.rewards, rewards, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in NAMES for option in options_of(name)])
def test_every_option_changes_the_result(name, option):
    arrays = make_arrays(1)
    needed = NEEDS.get(option, {})
    options = needed | {option: CHANGED[option]}
    with jax.enable_x64(True):
        taken = read(name, arrays)
        plain, _ = losses.LOSSES[name](**taken, **needed)
        found, metrics = losses.LOSSES[name](**taken, **options)
    assert np.abs(found - plain).max() > 1e-3
    loss, rewards = restate(name, arrays, **options)
    np.testing.assert_allclose(found, loss, rtol=1e-10)
    np.testing.assert_allclose(metrics.rewards, rewards, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if "divergence" in options_of(name)])
@pytest.mark.parametrize("divergence", losses.DIVERGENCES.values(), ids=losses.DIVERGENCES)
def test_divergences_in_every_loss_that_takes_one(name, divergence):
    arrays = make_arrays(1)
    with jax.enable_x64(True):
        found, _ = losses.LOSSES[name](**read(name, arrays), divergence=divergence)
    np.testing.assert_allclose(found, restate(name, arrays, divergence=divergence)[0], rtol=1e-10)


@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "changed"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name, changed):
    options = all_changed(name) if changed else {}
    arrays = make_arrays(5)
    with jax.enable_x64(True):
        taken = read(name, arrays)
        stopped = set(STOPPED.get(name, [])) | ({"kl"} if name == "tdpo2" else set())  # see test_token_level
        varied = {n: x for n, x in floats(taken).items() if n not in stopped}

        def loss(varied):
            varied = {n: jnp.asarray(x) for n, x in varied.items()}  # differences are taken on numpy arrays
            return losses.LOSSES[name](**(taken | varied), **options)[0]

        check_grads(loss, (varied,), order=2 if changed else 1, modes=["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "array"), [(name, array) for name, arrays in STOPPED.items() for array in arrays])
def test_no_gradient_through_what_is_no_function_of_the_policy(name, array):
    _, grads = value_and_grads(name, read(name, make_arrays(0)))
    np.testing.assert_array_equal(grads[array], 0)
    assert np.abs(grads["log_ratios"]).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_batched_equals_vmapped(name):
    loss = partial(losses.LOSSES[name], **UNCOUPLED.get(name, {}))
    arrays = make_arrays(2)
    if name in TRANSPORT:  # the batch is theirs: what is mapped lies before it
        arrays = {n: np.stack([x, x[::-1] * 2 if x.dtype != bool else x]) for n, x in arrays.items() if x.ndim}
    taken = read(name, arrays)
    axes = ({n: None if n == "baseline" else 0 for n in taken},)
    found, metrics = loss(**taken)
    mapped, mapped_metrics = jax.vmap(lambda one: loss(**one), in_axes=axes)(taken)
    np.testing.assert_allclose(found, mapped, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics.rewards, mapped_metrics.rewards, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_takes_any_leading_axes(name):
    taken = read(name, make_arrays(2))
    shape = (1, 4) if name in TRANSPORT else (2, 1, 2)
    folded = {n: x.reshape(*shape, *x.shape[1:]) if x.ndim else x for n, x in taken.items()}
    flat, _ = losses.LOSSES[name](**taken)
    found, metrics = losses.LOSSES[name](**folded)
    assert found.shape == (*shape, *flat.shape[1:])
    assert metrics.rewards.shape[:-1] == metrics.margins.shape == metrics.accuracies.shape == shape
    np.testing.assert_allclose(found.reshape(flat.shape), flat, rtol=1e-6)


def with_garbage(taken, garbage):
    """Puts garbage under the mask of every array of tokens."""
    mask = taken["mask"]
    garbage = jnp.resize(jnp.asarray(garbage), mask.shape)
    dirty = {n: jnp.where(mask, x, garbage) for n, x in floats(taken).items() if n in TOKENS}
    if "turns" in taken:  # where the environment speaks, and far behind the last
        dirty["turns"] = jnp.where(mask, taken["turns"], jnp.where(garbage > 0, 99, -1))
    return taken | dirty


@pytest.mark.parametrize("empty", [False, True], ids=["", "empty"])
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_under_the_mask_changes_neither_value_nor_gradient(name, empty):
    taken = read(name, make_arrays(3, empty=empty), jnp.float32)
    options = {"discount": 0.7, "bc_weight": 0.3} if name == "cpl" else {}
    loss, grads = value_and_grads(name, taken, **options)
    assert np.isfinite(loss).all()
    jax.tree.map(lambda grad: np.testing.assert_array_equal(np.isfinite(grad), True), grads)
    for garbage in (GARBAGE, GARBAGE[::-1]):
        dirty_loss, dirty_grads = value_and_grads(name, with_garbage(taken, garbage), **options)
        np.testing.assert_array_equal(dirty_loss, loss)
        jax.tree.map(np.testing.assert_array_equal, dirty_grads, grads)
    for array, grad in grads.items():
        if array in TOKENS:
            np.testing.assert_array_equal(grad[~taken["mask"]], 0)


@pytest.mark.parametrize("name", NAMES)
def test_garbage_is_masked_by_the_program_and_not_by_the_compiler(name):
    # NaN * False is NaN; a compiler may rewrite the product as a choice, and may as well not.
    taken = read(name, make_arrays(3), jnp.float32)
    loss, grads = value_and_grads(name, taken)
    with jax.disable_jit():
        dirty_loss, dirty_grads = value_and_grads(name, with_garbage(taken, GARBAGE))
    np.testing.assert_allclose(dirty_loss, loss, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), dirty_grads, grads)


@pytest.mark.parametrize("name", NAMES)
def test_more_padding_changes_nothing(name):
    taken = read(name, make_arrays(4))
    padded = {n: jnp.pad(x, ((0, 0), (0, 0), (2, 3))) if n in TOKENS else x for n, x in taken.items()}
    for options in ({}, all_changed(name)):
        found, expected = (losses.LOSSES[name](**x, **options)[0] for x in (padded, taken))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_under_jit_with_traced_numbers(name):
    taken = read(name, make_arrays(0))
    numbers = {option: value for option, value in all_changed(name).items() if isinstance(value, float)}
    # The numbers' types are Python's; the import hook of the tests would refuse what is traced in their place.
    unchecked = inspect.unwrap(losses.LOSSES[name])

    @jax.jit
    def compiled(taken, numbers):
        loss = lambda x: unchecked(**(taken | x), **numbers)[0].sum()  # noqa: E731
        return unchecked(**taken, **numbers), jax.grad(loss)(floats(taken))

    (found, metrics), grads = compiled(taken, numbers)
    expected, expected_metrics = losses.LOSSES[name](**taken, **numbers)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(metrics.rewards, expected_metrics.rewards, rtol=1e-6)
    eager = jax.grad(lambda x: losses.LOSSES[name](**(taken | x), **numbers)[0].sum())(floats(taken))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), grads, eager)


def huge(name, size):
    """All four combinations of signs; log-probabilities have none above 0, which takes the place of +."""
    signs = np.array([[c, r] for c in (1, -1) for r in (1, -1)], np.float32)[..., None] * np.ones(4, np.float32) / 4
    taken = {
        "log_ratios": signs * size,
        "logp": np.minimum(signs, 0) * size,
        "ref_logp": np.minimum(-signs, 0) * size,
        "kl": np.abs(signs) * size,
        "guide_rewards": signs,
        "weights": np.abs(signs),
        "turns": np.broadcast_to(np.arange(4), signs.shape),
        "mask": np.ones(signs.shape, bool),
        "labels": signs[..., 0] > 0,
        "baseline": np.float32(size),
        "rewards": signs[..., 0] * size,
        "reference_rewards": signs * -size,
    }
    return read(name, taken, jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_stays_finite_for_huge_margins(name):
    for options in ({}, all_changed(name)):
        for size in (100.0, 1e4):
            loss, grads = value_and_grads(name, huge(name, size), **options)
            assert np.isfinite(loss).all(), (options, size, loss)
            jax.tree.map(lambda grad: np.testing.assert_array_equal(np.isfinite(grad), True), grads)


DIVERGENT = [
    losses.forward_kl,
    losses.js_divergence,
    losses.alpha_divergence,
    partial(losses.alpha_divergence, alpha=2.0),
]


@pytest.mark.parametrize(
    ("name", "divergence"),
    [(name, d) for name in NAMES if "divergence" in options_of(name) for d in DIVERGENT],
)
def test_stays_finite_for_huge_margins_under_any_divergence(name, divergence):
    for size in (100.0, 1e4):
        loss, grads = value_and_grads(name, huge(name, size), divergence=divergence)
        assert np.isfinite(loss).all() and np.isfinite(grads["log_ratios"]).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_through_metrics(name):
    taken = read(name, make_arrays(0))

    def seen(x):
        metrics = losses.LOSSES[name](**(taken | x))[1]
        return (metrics.rewards**2).sum() + metrics.margins.sum()

    jax.tree.map(lambda grad: np.testing.assert_array_equal(grad, 0), jax.grad(seen)(floats(taken)))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_would_be_broadcast_are_refused(name):
    taken = read(name, make_arrays(0))
    for array, x in taken.items():
        if x.ndim:
            with pytest.raises((InputError, TypeError)):
                losses.LOSSES[name](**(taken | {array: x[:1]}))
            with pytest.raises((InputError, TypeError)):
                losses.LOSSES[name](**(taken | {array: x[None]}))


@pytest.mark.parametrize("name", [name for name in NAMES if not losses.reads_single(name) and name != "plackett_luce"])
@pytest.mark.parametrize("responses", [1, 3])
def test_pairs_have_two_responses(name, responses):
    with pytest.raises((InputError, TypeError)):
        losses.LOSSES[name](**read(name, make_arrays(0, responses=responses)))
