"""Preferences between images that the reference pipeline drew for one prompt."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from qstar_jax.tasks.drawing import words
from qstar_jax.tasks.drawing.judging import Judges
from qstar_jax.tasks.drawing.painter import Painter
from qstar_jax.tasks.drawing.refiner import Refiner


@dataclass(frozen=True)
class Pairs:
    """Pairs of runs of the reference pipeline; whoever labelled them saw the prompt and the images only.

    Attributes:
        prompts: Shape [N, 4].
        chosen: Outputs of both stages in the preferred run: requests [N, 2], trajectories [N, K, 64].
        rejected: The same of the other run.
        margins: True reward of the preferred image less that of the other. Shape [N].
    """

    prompts: Int[np.ndarray, "N 4"]
    chosen: tuple[np.ndarray, np.ndarray]
    rejected: tuple[np.ndarray, np.ndarray]
    margins: Float[np.ndarray, " N"]


def draw_pairs(
    refiner: Refiner, painter: Painter, references: tuple, judges: Judges, key: PRNGKeyArray, *, count: int
) -> Pairs:
    """Runs the references twice per prompt, and labels the images by Bradley-Terry.

    Args:
        refiner: Says what to draw.
        painter: Draws it.
        references: Parameters of both.
        judges: Who knows the true reward.
        key: Random key.
        count: Pairs; prompts take turns.
    """
    request_key, image_key, label_key = jax.random.split(key, 3)
    prompts = np.repeat(words.ALL_PROMPTS[np.arange(count) % len(words.ALL_PROMPTS)], 2, axis=0)
    requests = refiner.sample(references[0], request_key, prompts, ())
    states = np.asarray(painter.sample(references[1], image_key, prompts, (requests,)))
    rewards = judges.true_reward(prompts, states[:, 0]).reshape(count, 2)
    margins = rewards[:, 1] - rewards[:, 0]
    second = np.asarray(jax.random.uniform(label_key, (count,))) < 1 / (1 + np.exp(-margins))
    both = np.asarray(requests).reshape(count, 2, -1), states.reshape(count, 2, *states.shape[1:])
    rows = np.arange(count)
    chosen, rejected = (tuple(one[rows, which] for one in both) for which in (second.astype(int), 1 - second))
    return Pairs(prompts[::2], chosen, rejected, np.where(second, margins, -margins))
