"""The task of digits: images, the known reward, the denoiser and its two trainings."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import diffusion
from qstar_jax.errors import InputError
from qstar_jax.tasks import digits
from qstar_jax.tasks.digits.fitting import Pairs, fit_denoiser, fit_dpo


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("sklearn")
    return digits.load_images()


@pytest.fixture(scope="module")
def readers(data):
    return digits.Readers.fit(data)


@pytest.mark.parametrize("missing", ["sklearn.datasets", "sklearn.neighbors"])
def test_scikit_learn_is_asked_for_by_name(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    few = digits.Digits(np.zeros((2, 64), np.float32), np.array([0, 1]))
    with pytest.raises(InputError, match=r"pip install 'qstar_jax\[diffusion\]'"):
        digits.load_images() if missing == "sklearn.datasets" else digits.Readers.fit(few)


def test_images_and_two_halves_of_them(data):
    assert data.images.shape == (1797, 64) and data.images.min() == -1 and data.images.max() == 1
    assert sorted(set(data.digits)) == list(range(10))
    halves = data.half(0), data.half(1)
    assert [len(half.digits) for half in halves] == [899, 898]
    np.testing.assert_array_equal(halves[1].images[0], data.images[1])


def test_ink_by_hand():
    images = np.array([[-1.0] * 64, [1.0] * 64, [-3.0] * 32 + [5.0] * 32])
    np.testing.assert_allclose(digits.ink(images), [0, 1, 0.5])


def test_readers_read_what_they_have_not_seen(data, readers):
    first, second = data.half(0), data.half(1)
    assert readers.reads(first.images, first.digits).mean() > 0.95
    assert readers.reads(first.images, (first.digits + 1) % 10).mean() < 0.05
    assert readers.rewarding.score(second.images, second.digits) > 0.9


def test_the_reward_is_ink_and_legibility(data, readers):
    images, asked = data.images[:50], data.digits[:50]
    right, wrong = (digits.true_reward(readers, images, one) for one in (asked, (asked + 1) % 10))
    ink = 20 * digits.ink(images)
    assert (right <= ink).all() and (wrong >= ink - 8).all() and (right > wrong).mean() > 0.9
    shifted = digits.true_reward(readers, np.minimum(images + 0.5, 1), asked)
    assert shifted.mean() > right.mean() + 1


def test_a_denoiser_reads_its_step_and_its_digit_for_images_and_pairs():
    params = digits.init_denoiser(jax.random.key(0), hidden=(16,))
    x = jax.random.normal(jax.random.key(1), (4, 64))
    t, asked = jnp.array([1, 50, 50, 100]), digits.one_hot(jnp.array([3, 3, 4, 5]))
    assert not digits.predict_noise(params, x, t, asked).any()  # no noise at first
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    found = digits.conditioned(params, asked)(x, t)
    np.testing.assert_allclose(found, digits.predict_noise(params, x, t, asked))
    assert (found != digits.predict_noise(params, x, t, jnp.roll(asked, 1, axis=-1))).any()
    assert (found != digits.predict_noise(params, x, t - 1, asked)).any()
    pairs = digits.conditioned(params, asked)(jnp.stack([x, x], 1), jnp.stack([t, t], 1))
    np.testing.assert_allclose(pairs, jnp.stack([found, found], 1), rtol=1e-5, atol=1e-6)


def test_fitting_and_preferences_move_the_denoiser(data):
    schedule = diffusion.linear_schedule(20, last=0.3)
    start = digits.init_denoiser(jax.random.key(0), hidden=(32,))
    rate = {"batch_size": 64, "learning_rate": 3e-3}
    reference, error = fit_denoiser(
        start, schedule, data.images, np.eye(10)[data.digits], jax.random.key(1), steps=400, **rate
    )
    assert error < 0.7  # 1 at first
    # Dark images are preferred.
    dark, light = np.full((8, 64), 0.5, np.float32), np.full((8, 64), -0.5, np.float32)
    pairs = Pairs(np.stack([dark, light], 1), np.eye(10)[:8])

    def margin(params):
        t, noise = jnp.arange(1, 9), jax.random.normal(jax.random.key(3), (8, 64))
        errors, ref_errors = (
            diffusion.noise_errors(
                schedule, digits.conditioned(p, jnp.eye(10)[:8]), jnp.asarray(pairs.images), t, noise
            )
            for p in (params, reference)
        )
        return float(((ref_errors - errors) @ jnp.array([1.0, -1.0])).mean())

    options = {"stops": (5, 10), "batch_size": 16, "learning_rate": 1e-3}
    margins = {}
    for beta_dpo in (10.0, 5000.0):
        found = list(fit_dpo(reference, schedule, pairs, jax.random.key(2), beta_dpo=beta_dpo, **options))
        assert [steps for steps, _ in found] == [5, 10]
        margins[beta_dpo] = margin(found[-1][1])
    assert 0 < margins[5000.0] < margins[10.0]
