"""What an actor is trained and measured on: segments, preferences, and an environment where there is one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from qstar_jax.config import ControlConfig
from qstar_jax.control import lqr
from qstar_jax.control.actor import Actor, Params
from qstar_jax.control.segments import (
    Episodes,
    Segments,
    draw_pairs,
    draw_segments,
    pair_up,
    read_episodes,
    split_episodes,
)
from qstar_jax.errors import InputError

_STARTS, _STEPS = 512, 100  # states from which, and steps for which, a policy's cost is measured on `lqr`

# (actor, params, episodes) -> metrics; parameters are those for normalized observations.
Measure = Callable[[Actor, Params, int], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        train: Training segments, with normalized observations.
        pairs: Training pairs, the chosen segment first. Shape [N, 2].
        held_out: Segments of other episodes.
        held_out_pairs: Disjoint pairs of them. Shape [M, 2].
        shift: Subtracted from observations. Shape [O].
        scale: Divides them then. Shape [O].
        measure: Measures a policy in the environment; None where there is none.
    """

    train: Segments
    pairs: Int[np.ndarray, "N 2"]
    held_out: Segments
    held_out_pairs: Int[np.ndarray, "M 2"]
    shift: Float[np.ndarray, " O"]
    scale: Float[np.ndarray, " O"]
    measure: Measure | None = None


def load_task(config: ControlConfig, console: Console | None = None) -> Task:
    """Loads or makes episodes, and draws segments and preferences from them.

    Args:
        config: Options without nulls; see `config.control.with_task_defaults`.
        console: Where to show progress.

    Raises:
        InputError: If episodes or options cannot be used.
        ImportError: If the task needs a package that is missing; the message names the extra.
    """
    if config.task == "lqr":
        problem = lqr.point_mass(discount=config.segments.discount)
        gain = 0.5 * lqr.solve(problem).gain
        spread = 0.5 * np.eye(2)
        episodes = lqr.roll_out(problem, gain, spread, episodes=1000, steps=20, seed=config.segments.seed)
        return make_task(config, episodes, _from_the_optimum(problem), normalize=False)
    if config.task == "bin-picking-v3":
        from qstar_jax.control import meta_world

        episodes = meta_world.cached_episodes(config.segments.seed, config.segments.discount, console)
        task = make_task(config, episodes)
        return replace(task, measure=meta_world.success_measure(task.shift, task.scale))
    return make_task(config, read_episodes(Path(config.task).expanduser()))


def make_task(
    config: ControlConfig, episodes: Episodes, measure: Measure | None = None, *, normalize: bool = True
) -> Task:
    """Draws segments and preferences from episodes.

    Args:
        config: Options without nulls.
        episodes: The episodes.
        measure: See `Task`.
        normalize: Whether observations are brought to mean 0 and standard deviation 1 over the training segments.

    Raises:
        InputError: If there are too few episodes, or actions that the policy cannot take.
    """
    options = config.segments
    parts = split_episodes(episodes, held_out=options.held_out, seed=options.seed)
    drawn = {"length": options.length, "label": options.label, "discount": options.discount}
    train = draw_segments(parts[0], count=options.count, seed=options.seed, **drawn)
    held_out = draw_segments(parts[1], count=options.eval_segments, seed=options.seed + 1, **drawn)
    largest = max(abs(segments.actions).max() for segments in (train, held_out))
    if config.actor.kind == "squashed" and largest > 1:
        raise InputError(
            f"actor.kind is squashed, whose actions are in (-1, 1), but those of {config.task} reach {largest:.3g}; "
            "set --actor.kind gaussian, or divide the actions by their bound"
        )
    width = train.observations.shape[-1]
    shift, scale = np.zeros(width), np.ones(width)
    if normalize:
        shift, spread = train.observations.mean((0, 1)), train.observations.std((0, 1))
        scale = np.where(spread > 1e-6, spread, 1.0)  # what is constant stays so

    def normalized(segments: Segments) -> Segments:
        return replace(segments, observations=(segments.observations - shift) / scale)

    return Task(
        train=normalized(train),
        pairs=draw_pairs(train.scores, count=options.pairs, sampled=options.sampled, seed=options.seed),
        held_out=normalized(held_out),
        held_out_pairs=pair_up(held_out.scores, sampled=options.sampled, seed=options.seed),
        shift=shift,
        scale=scale,
        measure=measure,
    )


def _from_the_optimum(problem: lqr.LinearQuadratic) -> Measure:
    """Measures how far a policy without its noise is from the optimal gain, and what that costs; both relative."""
    gain, starts = lqr.solve(problem).gain, np.random.default_rng(0).normal(size=(_STARTS, problem.control.shape[0]))
    least = lqr.cost(problem, lambda states: -states @ gain.T, starts, steps=_STEPS)

    def measure(actor: Actor, params: Params, episodes: int) -> dict[str, float]:
        act = jax.jit(lambda states: actor.mode(params, states))
        slope = jax.jacobian(act)(jnp.zeros(gain.shape[1]))
        cost = lqr.cost(problem, lambda states: np.asarray(act(states.astype(np.float32))), starts, steps=_STEPS)
        return {
            "eval_gain_error": float(np.linalg.norm(np.asarray(slope) + gain) / np.linalg.norm(gain)),
            "eval_excess_cost": float(cost / least - 1),
        }

    return measure
