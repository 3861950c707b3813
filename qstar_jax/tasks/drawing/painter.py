"""The model that draws what is requested: the denoiser of digits, and what its reference gets wrong."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qstar_jax import diffusion
from qstar_jax.diffusion import Schedule
from qstar_jax.tasks.digits.denoiser import Params, conditioned, init_denoiser
from qstar_jax.tasks.digits.fitting import fit_denoiser
from qstar_jax.tasks.digits.images import CLASSES, PIXELS, Digits
from qstar_jax.tasks.drawing import words

WRONG_INK, WRONG_DIGIT = 0.2, 0.1  # share of images that the reference learns under the other ink, or digit
CONDITIONS = words.MEANINGS.shape[1]
_POWERS = np.array([2.0, 0.5])  # of the ink of each pixel, 0 to 1: thin, and bold


def make_schedule(steps: int = 20) -> Schedule:
    """Few steps, so that log-ratios of whole trajectories are cheap; little is left of an image after the last."""
    return diffusion.linear_schedule(steps, first=0.02 / steps, last=min(10 / steps, 0.6))


def inked(data: Digits) -> tuple[Digits, Int[np.ndarray, " M"]]:
    """Draws every image with thin and with bold ink.

    Args:
        data: N images.

    Returns:
        2 N images (2 N - 2 for odd N), of which every second one comes from every second of `data`, so that halves of
        the ones come from halves of the others; and their inks, 0 thin, 1 bold.
    """
    count = len(data.digits) // 2
    paper = (data.images[: 2 * count].reshape(count, 1, 2, PIXELS) + 1) / 2
    images = 2 * paper ** _POWERS[:, None, None] - 1
    shape = (count, 2, 2)
    digits = np.broadcast_to(data.digits[: 2 * count].reshape(count, 1, 2), shape)
    inks = np.broadcast_to(np.arange(2)[:, None], shape)
    return Digits(images.reshape(-1, PIXELS).astype(np.float32), digits.reshape(-1)), inks.reshape(-1)


def mislabel(
    digits: Int[np.ndarray, " N"], inks: Int[np.ndarray, " N"], seed: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Plants the faults of the reference: some images get the other ink, some another digit."""
    rng = np.random.default_rng(seed)
    inks = np.where(rng.random(len(inks)) < WRONG_INK, 1 - inks, inks)
    others = (digits + rng.integers(1, CLASSES, len(digits))) % CLASSES
    return np.where(rng.random(len(digits)) < WRONG_DIGIT, others, digits), inks


def fit_painter(
    data: Digits,
    schedule: Schedule,
    key: PRNGKeyArray,
    *,
    seed: int,
    steps: int = 3000,
    hidden: tuple[int, ...] = (192, 192, 192),
) -> tuple[Params, float]:
    """Fits the reference to images of both inks, with the faults of `mislabel`.

    Args:
        data: Images, as `digits.load_images` has them.
        schedule: See `make_schedule`.
        key: Key of the first parameters, batches, steps and noise.
        seed: Seed of the faults.
        steps: Steps of training.
        hidden: Widths of the hidden layers.

    Returns:
        Parameters, and the mean squared error per pixel in the last tenth of the steps.
    """
    images, inks = inked(data)
    digits, inks = mislabel(images.digits, inks, seed)
    conditions = np.concatenate([np.eye(CLASSES)[digits], np.eye(len(words.INKS))[inks]], axis=1).astype(np.float32)
    init_key, fit_key = jax.random.split(key)
    start = init_denoiser(init_key, hidden, conditions=CONDITIONS)
    return fit_denoiser(start, schedule, images.images, conditions, fit_key, steps=steps)


def condition(requests: Int[Array, "B 2"]) -> Float[Array, "B 12"]:
    """What the words of a request say of the image, by a fixed table; no gradient flows through words."""
    return jnp.asarray(words.MEANINGS)[requests].sum(1)


@dataclass(frozen=True, eq=False)
class Painter:
    """The painter as a stage of a pipeline: its outputs are trajectories [B, K, 64], of which people see entry 0.

    Attributes:
        schedule: See `make_schedule`.
    """

    schedule: Schedule

    @partial(jax.jit, static_argnums=0)
    def log_ratio(
        self,
        reference: Params,
        params: Params,
        prompts: Int[Array, "B 4"],
        before: tuple[Int[Array, "B 2"]],
        states: Float[Array, "B K 64"],
    ) -> Float[Array, " B"]:
        """Log-ratios of whole trajectories, in nats, exact; bind the reference, and it is a `Stage`'s."""
        policy, ref = (conditioned(one, condition(before[0])) for one in (params, reference))
        return diffusion.score_steps(self.schedule, policy, ref, states.swapaxes(0, 1)).returns(1.0)

    @partial(jax.jit, static_argnums=0)
    def sample(
        self, params: Params, key: PRNGKeyArray, prompts: Int[Array, "B 4"], before: tuple[Int[Array, "B 2"]]
    ) -> Float[Array, "B K 64"]:
        """Draws a trajectory for each request."""
        eps_fn = conditioned(params, condition(before[0]))
        return diffusion.sample(self.schedule, eps_fn, key, (len(prompts), PIXELS)).swapaxes(0, 1)
