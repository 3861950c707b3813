"""The task of the refiner and the painter: planted faults, the known reward, causes, and both as stages."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import diffusion, pipeline
from qstar_jax.pipeline import Stage
from qstar_jax.tasks import digits, drawing
from qstar_jax.tasks.drawing import painter as painting
from qstar_jax.tasks.drawing import refiner as refining
from qstar_jax.tasks.drawing import words


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("sklearn")
    return digits.load_images()


@pytest.fixture(scope="module")
def judges(data):
    return drawing.Judges.fit(data)


@pytest.fixture(scope="module")
def refiner():
    return drawing.Refiner(drawing.make_model(width=32))


@pytest.fixture(scope="module")
def refiner_reference(refiner):
    return drawing.fit_refiner(refiner.model, jax.random.key(0), steps=60, learning_rate=1e-2)


@pytest.fixture(scope="module")
def painter():
    return drawing.Painter(drawing.make_schedule(8))


@pytest.fixture(scope="module")
def painter_reference(data, painter):
    return drawing.fit_painter(data, painter.schedule, jax.random.key(1), seed=0, steps=300, hidden=(48,))


def tokens(*texts):
    return np.array([words.encode(text) for text in texts])


def test_words_and_what_they_mean():
    assert len(words.ALL_PROMPTS) == 8 and len(words.ALL_REQUESTS) == 20
    assert words.decode(words.ALL_PROMPTS[1]) == "draw something odd bold"
    prompts = tokens("draw something odd bold", "draw something small thin", "draw something large bold")
    requests = tokens("seven bold", "four bold", "bold nine")
    assert words.fits(prompts, requests).tolist() == [True, False, False]
    digit, ink = words.requested(requests)
    assert digit.tolist() == [7, 4, -1] and ink.tolist() == [1, 1, -1]
    condition = painting.condition(jnp.asarray(requests))
    assert [np.flatnonzero(row).tolist() for row in condition] == [[7, 11], [4, 11], [9, 11]]


def test_the_refiner_learns_its_faults(refiner, refiner_reference):
    params, divergence = refiner_reference
    assert divergence < 0.05
    law = refining.planted().reshape(8, 10, 2)
    np.testing.assert_allclose(law.sum((1, 2)), 1)
    odd_bold = law[1]
    assert odd_bold[1::2].sum() == pytest.approx(0.6) and odd_bold[:, 1].sum() == pytest.approx(0.8)
    prompts = np.repeat(words.ALL_PROMPTS, 500, axis=0)
    requests = np.asarray(refiner.sample(params, jax.random.key(2), prompts, ()))
    assert words.fits(prompts, requests).mean() == pytest.approx(0.6 * 0.8, abs=0.06)


def test_halves_of_inked_images_come_from_halves_of_the_images(data):
    images, inks = painting.inked(data)
    assert len(inks) == 2 * 1796 and inks.mean() == 0.5
    thin = images.images[inks == 0]
    np.testing.assert_allclose((thin + 1) / 2, ((data.images[:1796] + 1) / 2) ** 2, atol=1e-6)
    # Of the first half, thin and bold, all digits are those of the first half of the data, in order.
    half, half_inks = images.half(0), inks[::2]
    np.testing.assert_array_equal(half.digits[half_inks == 1], data.half(0).digits[:898])
    bold_ink, thin_ink = (digits.ink(images.images[inks == one]) for one in (1, 0))
    middle = drawing.judging.MIDDLE
    assert (bold_ink > middle).mean() > 0.9 and (thin_ink < middle).mean() > 0.9


def test_the_painter_learns_from_faulty_labels():
    asked, inks = np.arange(10_000) % 10, np.arange(10_000) // 5000
    other_digits, other_inks = painting.mislabel(asked, inks, seed=0)
    assert (other_inks != inks).mean() == pytest.approx(0.2, abs=0.02)
    assert (other_digits != asked).mean() == pytest.approx(0.1, abs=0.02)
    assert set(other_digits) == set(range(10))


def test_the_reward_sees_the_prompt_and_the_image_only(data, judges):
    assert list(inspect.signature(judges.true_reward).parameters) == ["prompts", "images"]
    images, inks = painting.inked(data)
    chosen = np.flatnonzero((images.digits == 7) & (inks == 1))[:40]
    bold_sevens = images.images[chosen]
    mean = {
        text: judges.true_reward(np.tile(tokens(text), (40, 1)), bold_sevens).mean()
        for text in ("draw something odd bold", "draw something odd thin", "draw something even bold")
    }
    right, wrong_ink, wrong_kind = mean.values()
    assert -0.5 < right < 0 and wrong_ink < right - 2 and wrong_kind < right - 2
    white = judges.true_reward(tokens("draw something odd bold"), -np.ones((1, 64)))
    assert white == pytest.approx(-40 * 0.31, abs=5)


def test_causes_of_bad_images(data, judges):
    images, inks = painting.inked(data)
    digit, bold = judges.look(images.images)
    faithful = np.flatnonzero((digit == images.digits) & (bold == inks) & (digit == 7) & bold)[:4]
    prompts = tokens(*["draw something odd bold", "draw something even bold"] * 2)
    requests = tokens("seven bold", "seven bold", "five bold", "two thin")
    found = judges.faults(prompts, requests, images.images[faithful])
    # Nobody; the refiner; the painter, who drew something else, though it fits; both.
    assert found.tolist() == [[False, False], [True, False], [False, True], [True, True]]


def test_log_ratios_of_both_stages(refiner, refiner_reference, painter, painter_reference):
    prompts = jnp.asarray(words.ALL_PROMPTS)
    params = jax.tree.map(lambda leaf: leaf * 1.02, refiner_reference[0])
    requests = refiner.sample(params, jax.random.key(0), prompts, ())

    both = [
        np.array(refining.logp(refiner.model, one, *map(jnp.asarray, refining.all_pairs()))).reshape(8, 20)
        for one in (params, refiner_reference[0])
    ]
    assert np.exp(both[1]).sum(1) == pytest.approx(1, abs=0.05)  # few other words
    index = [words.ALL_REQUESTS.tolist().index(one) for one in np.asarray(requests).tolist()]
    found = refiner.log_ratio(refiner_reference[0], params, prompts, (), requests)
    np.testing.assert_allclose(found, (both[0] - both[1])[np.arange(8), index], atol=1e-4)

    policy = jax.tree.map(lambda leaf: leaf * 1.02, painter_reference[0])
    states = painter.sample(policy, jax.random.key(1), prompts, (requests,))
    assert states.shape == (8, 9, 64)
    found = painter.log_ratio(painter_reference[0], policy, prompts, (requests,), states)
    # Step by step, with the densities of normal distributions.
    condition, total, both = painting.condition(requests), 0.0, (policy, painter_reference[0])
    for step in range(1, 9):
        x, following, t = states[:, step], states[:, step - 1], jnp.full(8, step)
        noises = [digits.predict_noise(one, x, t, condition) for one in both]
        means = [diffusion.step_mean(painter.schedule, noise, x, t) for noise in noises]
        deviation = jnp.sqrt(painter.schedule.variance[step])
        logs = [jax.scipy.stats.norm.logpdf(following, mean, deviation).sum(-1) for mean in means]
        total += logs[0] - logs[1]
    np.testing.assert_allclose(found, total, rtol=1e-3, atol=1e-2)


def test_pairs_are_labelled_by_their_images_and_train_both_stages(
    judges, refiner, refiner_reference, painter, painter_reference
):
    references = refiner_reference[0], painter_reference[0]
    pairs = drawing.draw_pairs(refiner, painter, references, judges, jax.random.key(3), count=400)
    rewards = [judges.true_reward(pairs.prompts, outputs[1][:, 0]) for outputs in (pairs.chosen, pairs.rejected)]
    np.testing.assert_allclose(pairs.margins, rewards[0] - rewards[1], atol=1e-5)
    agree = 1 / (1 + np.exp(-np.abs(pairs.margins)))  # Bradley-Terry
    assert (pairs.margins > 0).mean() == pytest.approx(agree.mean(), abs=0.07) and (pairs.margins < 0).any()
    stages = (
        Stage("refiner", partial(refiner.log_ratio, references[0]), refiner.sample, 0.5),
        Stage("painter", partial(painter.log_ratio, references[1]), painter.sample, 0.5),
    )

    @jax.jit
    def loss_fn(params):
        return pipeline.joint_loss(stages, params, pairs.prompts, pairs.chosen, pairs.rejected)[0].mean()

    loss, gradients = jax.value_and_grad(loss_fn)(references)
    assert loss == pytest.approx(np.log(2), abs=1e-5)
    moved = tuple(
        jax.tree.map(lambda leaf, slope, rate=rate: leaf - rate * slope, params, slopes)
        for params, slopes, rate in zip(references, gradients, (1e-2, 1e-6), strict=True)
    )
    for params in (moved, (moved[0], references[1]), (references[0], moved[1])):
        assert loss_fn(params) < loss - 1e-4
    outputs = pipeline.sample(stages, references, jax.random.key(4), jnp.asarray(words.ALL_PROMPTS))
    np.testing.assert_allclose(pipeline.stage_rewards(stages, references, words.ALL_PROMPTS, outputs), 0, atol=1e-5)
