"""Episodes of any length, and segments of one length with a score: what preferences in control are made of.

Shapes: E episodes of at most T steps, O numbers in an observation, A in an action; B segments of L steps. numpy arrays.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from qstar_jax.errors import InputError

Label = Literal["regret", "reward"]

# Array of a file -> its dimensions; T + 1 is written T1, and is checked against T.
ARRAYS = {
    "observations": ("E", "T1", "O"),
    "actions": ("E", "T", "A"),
    "rewards": ("E", "T"),
    "lengths": ("E",),
    "values": ("E", "T1"),
}


@dataclass(frozen=True)
class Episodes:
    """Episodes, padded to the longest.

    Attributes:
        observations: Observations, that after the last step included. Shape [E, T + 1, O].
        actions: Actions. Shape [E, T, A].
        rewards: Reward of each step. Shape [E, T].
        lengths: Steps of each episode, at most T. Shape [E].
        values: V of each state, which labels by regret need at both ends of a segment; NaN, or None for all: unknown.
            Shape [E, T + 1].
    """

    observations: Float[np.ndarray, "E T1 O"]
    actions: Float[np.ndarray, "E T A"]
    rewards: Float[np.ndarray, "E T"]
    lengths: Int[np.ndarray, " E"]
    values: Float[np.ndarray, "E T1"] | None = None

    def select(self, episodes: Int[np.ndarray, " K"]) -> "Episodes":
        """Selects episodes by their numbers."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return Episodes(**{name: None if array is None else array[episodes] for name, array in arrays.items()})


@dataclass(frozen=True)
class Segments:
    """Segments of one length, each with a score.

    Attributes:
        observations: Observations at which the actions were taken. Shape [B, L, O].
        actions: Actions. Shape [B, L, A].
        scores: Higher for better; of differences of scores preferences are made. Shape [B].
    """

    observations: Float[np.ndarray, "B L O"]
    actions: Float[np.ndarray, "B L A"]
    scores: Float[np.ndarray, " B"]


def read_episodes(path: Path) -> Episodes:
    """Reads episodes from an .npz file with the arrays of `Episodes` (`values` may be missing); pickles are refused.

    Raises:
        InputError: If the file cannot be read, or an array is missing, unknown, or not of the expected shape and kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected lqr, bin-picking-v3 or an .npz file of episodes") from error
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: no .npz file of plain arrays ({reason}); write it with numpy.savez") from error
    unknown, missing = sorted(arrays.keys() - ARRAYS), sorted(ARRAYS.keys() - arrays.keys() - {"values"})
    if unknown or missing:
        found = ", ".join(arrays) or "none"
        raise InputError(
            f"{path}: {'unknown array ' + unknown[0] if unknown else 'no array ' + missing[0]} (found: {found}); "
            "expected observations, actions, rewards, lengths, and values for labels by regret"
        )
    _check(arrays, path)
    return Episodes(**{name: array.astype(int if name == "lengths" else np.float64) for name, array in arrays.items()})


def _check(arrays: dict[str, np.ndarray], path: Path):
    """Refuses arrays of another kind or shape, and numbers that are not finite."""
    for name, array in arrays.items():
        kinds, expected = ("iu", "integers") if name == "lengths" else ("fiu", "numbers")
        if array.dtype.kind not in kinds:
            raise InputError(f"{path}: {name} has dtype {array.dtype}; expected {expected}")
        if array.ndim != len(ARRAYS[name]):
            raise InputError(f"{path}: {name} has shape {list(array.shape)}; expected [{', '.join(ARRAYS[name])}]")
    sizes = dict(zip(ARRAYS["actions"], arrays["actions"].shape, strict=True))
    sizes |= {"T1": sizes["T"] + 1, "O": arrays["observations"].shape[-1]}
    for name, array in arrays.items():
        shape = [sizes[dimension] for dimension in ARRAYS[name]]
        if list(array.shape) != shape:
            raise InputError(
                f"{path}: {name} has shape {list(array.shape)}; expected {shape}, as actions has "
                f"{list(arrays['actions'].shape)} (T1 = T + 1: the state after the last step counts)"
            )
    lengths = arrays["lengths"]
    if lengths.size == 0 or lengths.min() < 1 or lengths.max() > sizes["T"]:
        raise InputError(f"{path}: lengths must lie in [1, {sizes['T']}], one for each of at least one episode")
    for name, array in arrays.items():
        if name == "lengths":
            continue
        used = np.arange(array.shape[1]) < lengths[:, None] + (ARRAYS[name][1] == "T1")
        refused = np.isinf if name == "values" else lambda numbers: ~np.isfinite(numbers)  # NaN: V is unknown
        if refused(array[used].astype(np.float64)).any():
            raise InputError(f"{path}: {name} holds {'infinity' if name == 'values' else 'NaN or infinity'} in a step")


def split_episodes(episodes: Episodes, *, held_out: float, seed: int) -> tuple[Episodes, Episodes]:
    """Splits episodes at random, so that no segment for evaluation shares an episode with one for training.

    Args:
        episodes: The episodes, at least two.
        held_out: Share of the second part; each part has at least one episode.
        seed: Seed of the order.

    Raises:
        InputError: If there is one episode only.
    """
    count = len(episodes.lengths)
    if count < 2:
        raise InputError("one episode cannot be split into training and held-out ones; expected at least two")
    order = np.random.default_rng(seed).permutation(count)
    held = min(max(round(held_out * count), 1), count - 1)
    return episodes.select(order[held:]), episodes.select(order[:held])


def draw_segments(episodes: Episodes, *, length: int, count: int, label: Label, discount: float, seed: int) -> Segments:
    """Draws segments uniformly from all stretches of `length` steps, without drawing one twice where they suffice.

    Args:
        episodes: The episodes.
        length: Steps of a segment, L.
        count: Number of segments.
        label: What scores them. `reward`: sum_t gamma^t r_t. `regret`: that plus gamma^L V(end) - V(start), the negated
            regret; where V is V* and nothing is random, this is the discounted sum of advantages A*.
        discount: gamma.
        seed: Seed of the draws.

    Raises:
        InputError: If no episode is long enough, or values are needed and missing.
    """
    if label == "regret" and episodes.values is None:
        raise InputError(
            "labels by regret need the array values (V of every state), which is missing; add it, or set "
            "--segments.label reward"
        )
    # Every stretch of an episode, with V known at both ends where it is needed.
    first = np.arange(max(episodes.rewards.shape[1] - length + 1, 0))
    possible = first + length <= episodes.lengths[:, None]
    if label == "regret" and possible.any():
        possible &= np.isfinite(episodes.values[:, first]) & np.isfinite(episodes.values[:, first + length])
    episode, start = np.nonzero(possible)
    if len(episode) == 0:
        raise InputError(
            f"no episode has {length} steps{' with V at both ends' if label == 'regret' else ''} (the longest has "
            f"{episodes.lengths.max()}); lower --segments.length"
        )
    numbers = np.random.default_rng(seed).choice(len(episode), count, replace=count > len(episode))
    episode, start = episode[numbers], start[numbers]
    steps = start[:, None] + np.arange(length)
    scores = episodes.rewards[episode[:, None], steps] @ discount ** np.arange(length)
    if label == "regret":
        after = episodes.values[episode, start + length]
        scores = scores + discount**length * after - episodes.values[episode, start]
    return Segments(episodes.observations[episode[:, None], steps], episodes.actions[episode[:, None], steps], scores)


def draw_pairs(scores: Float[np.ndarray, " B"], *, count: int, sampled: bool, seed: int) -> Int[np.ndarray, "count 2"]:
    """Draws pairs of segments, the chosen one first.

    Args:
        scores: Score of each segment; not all equal.
        count: Number of pairs.
        sampled: Whether the first of a pair is chosen with probability sigma(score - other score), as preferences by
            regret are modelled, or else the one with the higher score; equal scores then make no pair.
        seed: Seed of pairs and labels.

    Raises:
        InputError: If all scores are equal.
    """
    if len(scores) < 2 or (scores == scores[0]).all():
        raise InputError(f"{len(scores)} segments with equal scores make no pairs; expected at least two that differ")
    rng, pairs = np.random.default_rng(seed), np.zeros((0, 2), int)
    while len(pairs) < count:
        drawn = rng.integers(0, len(scores), (count, 2))
        pairs = np.concatenate([pairs, _label(drawn[drawn[:, 0] != drawn[:, 1]], scores, sampled, rng)])
    return pairs[:count]


def pair_up(scores: Float[np.ndarray, " B"], *, sampled: bool, seed: int) -> Int[np.ndarray, "N 2"]:
    """Makes disjoint pairs of all segments (but one where their number is odd), the chosen one first.

    Args:
        scores: Score of each segment.
        sampled: See `draw_pairs`.
        seed: Seed of pairs and labels.

    Raises:
        InputError: If no pair has scores that differ.
    """
    rng = np.random.default_rng(seed)
    pairs = _label(rng.permutation(len(scores))[: len(scores) // 2 * 2].reshape(-1, 2), scores, sampled, rng)
    if len(pairs) < 2:
        raise InputError(
            f"{len(scores)} held-out segments make {len(pairs)} pairs; expected at least two, for a standard error: "
            "raise --segments.eval_segments"
        )
    return pairs


def _label(
    drawn: Int[np.ndarray, "N 2"], scores: Float[np.ndarray, " B"], sampled: bool, rng: np.random.Generator
) -> Int[np.ndarray, "M 2"]:
    """Puts the chosen segment of each pair first; pairs that are not labelled are left out."""
    first, second = scores[drawn].T
    if sampled:
        odds = np.exp(np.clip(first - second, -700, 700))
        return np.where((rng.random(len(drawn)) < odds / (1 + odds))[:, None], drawn, drawn[:, ::-1])
    return np.where((first > second)[:, None], drawn, drawn[:, ::-1])[first != second]
