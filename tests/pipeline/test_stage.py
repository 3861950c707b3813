"""Two stages over a few tokens, where everything is exact, in float64; and a stage that denoises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import diffusion, pipeline
from qstar_jax.errors import InputError
from qstar_jax.pipeline import Stage

OUTLINES, TEXTS = 3, 4
PROMPTS = 2
EXACT = {"rtol": 0, "atol": 1e-8}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def reference():
    """log pi_ref(z | x) [X, Z] and log pi_ref(y | x, z) [X, Z, Y]."""
    first, second = np.random.default_rng(0).normal(size=(PROMPTS, OUTLINES)), np.random.default_rng(1)
    return jax.nn.log_softmax(jnp.asarray(first)), jax.nn.log_softmax(
        jnp.asarray(second.normal(size=(PROMPTS, OUTLINES, TEXTS)))
    )


def stages(betas):
    """An outline z, then a text y; parameters are logits."""
    ref_first, ref_second = reference()

    def outline_ratio(logits, x, before, z):
        return (jax.nn.log_softmax(logits) - ref_first)[x, z]

    def text_ratio(logits, x, before, y):
        return (jax.nn.log_softmax(logits) - ref_second)[x, before[0], y]

    return (
        Stage("outline", outline_ratio, lambda logits, key, x, _: jax.random.categorical(key, logits[x]), betas[0]),
        Stage("text", text_ratio, lambda p, key, x, z: jax.random.categorical(key, p[x, z[0]]), betas[1]),
    )


def all_runs():
    """Every (z, y), and every pair of them for every prompt: prompts, chosen, rejected."""
    z, y = (grid.reshape(-1) for grid in np.indices((OUTLINES, TEXTS)))
    x, i, j = (grid.reshape(-1) for grid in np.indices((PROMPTS, len(z), len(z))))
    return x, (z[i], y[i]), (z[j], y[j])


@partial(jax.jit, static_argnums=0)
def fit_exactly(betas, rewards):
    """Logits that minimize the population loss under exact labels, by Newton's method from the reference."""
    x, chosen, rejected = all_runs()
    labels = jax.nn.sigmoid(rewards[x, *chosen] - rewards[x, *rejected])
    sizes = (PROMPTS * OUTLINES, PROMPTS * OUTLINES * TEXTS)

    def unpack(flat):
        return flat[: sizes[0]].reshape(PROMPTS, OUTLINES), flat[sizes[0] :].reshape(PROMPTS, OUTLINES, TEXTS)

    def loss_fn(flat):
        loss, _ = pipeline.joint_loss(stages(betas), unpack(flat), x, chosen, rejected)
        return (labels * loss).sum()

    def newton(_, flat):
        return flat - 0.7 * jnp.linalg.pinv(jax.hessian(loss_fn)(flat), rtol=1e-9) @ jax.grad(loss_fn)(flat)

    start = jnp.concatenate([logits.reshape(-1) for logits in reference()])
    return unpack(jax.lax.fori_loop(0, 60, newton, start))


def optimum(betas, rewards):
    """Stage rewards of the optimal pipeline, in numpy: values of outlines are soft at the temperature of texts."""
    first, second = map(np.asarray, reference())
    values = betas[1] * np.log(np.exp(second + rewards / betas[1]).sum(-1))
    start = betas[0] * np.log(np.exp(first + values / betas[0]).sum(-1))
    return values - start[:, None], rewards - values[..., None]


@pytest.mark.parametrize("betas", [(0.5, 0.5), (0.8, 0.4)])
def test_labels_of_the_last_output_give_every_stage_its_own_advantage(betas):
    """With equal and with different temperatures; from labels of texts alone the outline learns what it is worth."""
    rewards = 0.4 * np.random.default_rng(2).normal(size=(PROMPTS, OUTLINES, TEXTS))
    params = fit_exactly(betas, jnp.asarray(rewards))
    x, (z, y), _ = all_runs()
    found = pipeline.stage_rewards(stages(betas), params, x, (z, y))
    outline, text = optimum(betas, rewards)
    np.testing.assert_allclose(found, np.stack([outline[x, z], text[x, z, y]], -1), **EXACT)


@pytest.mark.parametrize("guilty", [0, 1])
def test_credit_moves_to_the_stage_that_is_to_blame(guilty):
    """Where only outlines, or only texts, are good or bad, the other stage keeps to its reference."""
    rewards = np.zeros((PROMPTS, OUTLINES, TEXTS))
    if guilty == 0:
        rewards[:, 1] = -0.6
    else:
        rewards[:, :, 2] = -0.6
    betas = (0.5, 0.5)
    params = fit_exactly(betas, jnp.asarray(rewards))
    x, (z, y), _ = all_runs()
    found = np.asarray(pipeline.stage_rewards(stages(betas), params, x, (z, y)))
    bad = (z == 1) if guilty == 0 else (y == 2)
    assert found[bad, guilty].max() < found[~bad, guilty].min() - 0.3
    if guilty == 0:
        np.testing.assert_allclose(found[:, 1], 0, **EXACT)
    else:  # values of outlines differ only by how often the reference's texts are bad
        assert np.abs(found[:, 0]).max() < 0.3


def test_the_loss_by_hand_and_its_betas():
    x = jnp.array([0, 1])
    chosen, rejected = (jnp.array([0, 2]), jnp.array([1, 1])), (jnp.array([1, 2]), jnp.array([3, 0]))
    params = tuple(logits + jnp.sin(jnp.arange(logits.size)).reshape(logits.shape) for logits in reference())
    ratios = [np.asarray(jax.nn.log_softmax(p) - ref) for p, ref in zip(params, reference(), strict=True)]
    for betas in ((0.3, 0.3), (0.3, 2.0)):
        loss, metrics = pipeline.joint_loss(stages(betas), params, x, chosen, rejected)
        rewards = [
            betas[0] * ratios[0][x, outputs[0]] + betas[1] * ratios[1][x, outputs[0], outputs[1]]
            for outputs in (chosen, rejected)
        ]
        np.testing.assert_allclose(metrics.rewards, np.stack(rewards, -1), **EXACT)
        np.testing.assert_allclose(loss, np.log1p(np.exp(rewards[1] - rewards[0])), **EXACT)


def test_samples_follow_the_stages():
    count = 20_000
    x = jnp.arange(count) % PROMPTS
    z, y = pipeline.sample(stages((1.0, 1.0)), reference(), jax.random.key(0), x)
    first, second = (np.exp(table) for table in reference())
    found = np.zeros((PROMPTS, OUTLINES, TEXTS))
    np.add.at(found, (np.asarray(x), np.asarray(z), np.asarray(y)), PROMPTS / count)
    np.testing.assert_allclose(found, first[..., None] * second, atol=5 * np.sqrt(0.25 * PROMPTS / count))


def test_missing_parts_are_refused():
    params, x = reference(), jnp.array([0])
    with pytest.raises(InputError, match=r"1 params for 2 stages \(outline, text\)"):
        pipeline.sample(stages((1.0, 1.0)), params[:1], jax.random.key(0), x)
    with pytest.raises(InputError, match="1 outputs for 2 stages"):
        pipeline.stage_rewards(stages((1.0, 1.0)), params, x, (x,))


def denoising_stage(schedule):
    """A stage whose output is a trajectory: a third kind, in a few lines. What it predicts depends on z."""
    ref = jnp.zeros(OUTLINES)

    def eps_fn(shifts, z):
        return lambda x, t: 0.5 * x + shifts[z][:, None]

    def log_ratio(shifts, prompt, before, states):
        return diffusion.score_steps(schedule, eps_fn(shifts, before[0]), eps_fn(ref, before[0]), states).returns(1.0)

    def draw(shifts, key, prompt, before):
        return diffusion.sample(schedule, eps_fn(shifts, before[0]), key, (len(prompt), 2))

    return Stage("image", log_ratio, draw, 0.2)


@pytest.mark.slow
def test_tokens_and_an_image_learn_from_preferences_between_images():
    schedule, count = diffusion.linear_schedule(4, first=0.1, last=0.4), 400
    hybrid = (stages((0.2, 0.2))[0], denoising_stage(schedule))
    params = (reference()[0], jnp.zeros(OUTLINES))
    x = jnp.arange(count) % PROMPTS
    first, second = (pipeline.sample(hybrid, params, jax.random.key(seed), x) for seed in (0, 1))
    better = first[1][0].mean(-1) > second[1][0].mean(-1)  # bright images are preferred

    def choose(condition):  # images lie behind their steps
        return jnp.where(condition, first[0], second[0]), jnp.where(condition[:, None], first[1], second[1])

    gradient = jax.grad(lambda p: pipeline.joint_loss(hybrid, p, x, choose(better), choose(~better))[0].mean())(params)
    # A lower prediction of noise makes images brighter.
    assert (gradient[1] > 0).all() and jnp.abs(gradient[0]).max() > 0
