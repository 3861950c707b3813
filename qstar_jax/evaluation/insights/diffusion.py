"""Diffusion: does DPO on images alone make a diffusion model's log-ratios the rewards of its denoising steps?

The paper's Appendix B derives it, and runs nothing. Here the true reward of an image is known, and so is the divergence
of policy and reference at every step, because steps are Gaussians of one variance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval, bootstrap, mean_interval, rank_correlation

Picture = tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """What one policy draws.

    Attributes:
        steps: Steps of DPO.
        reward: True reward of its images.
        ink: Share of ink.
        read: Share of images in which the judging reader sees the digit that was asked for.
        kl: Divergence from the reference, in nats per trajectory.
        gain: Reward less that of the reference from the same noise.
        read_gain: Images read, less those of the reference from the same noise.
    """

    steps: int
    reward: Interval
    ink: Interval
    read: Interval
    kl: Interval
    gain: Interval
    read_gain: Interval


@dataclass(frozen=True)
class Strength:
    """What DPO with one strength of the penalty taught.

    Attributes:
        beta_dpo: The strength.
        points: The policy in training, in order.
        correlation: Spearman's, of exact implicit returns with true rewards, on trajectories of the reference.
        chosen: Mean log-ratio of the preferred trajectories of held-out pairs, in nats.
        rejected: The same of the others.
        expected: -KL(reference || policy): the mean over all of them, in closed form (Eq. 16).
        images: One image per digit, after training, from the noise of the reference's.
        credit: Log-ratio of each pixel of these images, summed over steps, in nats.
        mean_credit: The mean of that over all images that were drawn of a digit.
    """

    beta_dpo: float
    points: tuple[Point, ...]
    correlation: Interval
    chosen: Interval
    rejected: Interval
    expected: Interval
    images: tuple[Picture, ...]
    credit: tuple[Picture, ...]
    mean_credit: tuple[Picture, ...]


@dataclass(frozen=True)
class Diffusion(Record):
    """diffusion.json: what preferences between images taught a diffusion model.

    Attributes:
        seed: Seed of everything that was drawn.
        steps: T, the number of denoising steps.
        pairs: Pairs that DPO was trained on.
        agreement: Share of their labels that agree with the true reward.
        samples: Images per measurement.
        reference: The reference; its divergence and gains are 0.
        images: One image per digit of the reference.
        strengths: DPO by strength of the penalty, ascending.
    """

    NAME: ClassVar[str] = "diffusion"
    COMMAND: ClassVar[str] = "qstar demo --insight diffusion"

    seed: int
    steps: int
    pairs: int
    agreement: float
    samples: int
    reference: Point
    images: tuple[Picture, ...]
    strengths: tuple[Strength, ...]

    def finding(self) -> Finding:
        """Reproduced where all policies gain reward, all returns rank images, and the weakest penalty loses digits."""
        last = [one.points[-1] for one in self.strengths]
        weakest = self.strengths[0].points[-1]
        signs = [one.gain.sign for one in last] + [one.correlation.sign for one in self.strengths]
        signs.append(-weakest.read_gain.sign)
        reproduced = None
        if min(signs) > 0:
            reproduced = True
        elif min(signs) < 0:
            reproduced = False
        curve = "; ".join(
            f"beta_dpo {one.beta_dpo:g}: reward {point.gain:+.2f} at {point.kl.mean:.1f} nats, read "
            f"{point.read.mean:.2f}, rank correlation {one.correlation:.2f}"
            for one, point in zip(self.strengths, last, strict=True)
        )
        return Finding(
            insight="diffusion",
            title="Rewards of denoising steps",
            claim="DPO on images alone turns log-ratios of denoising steps into rewards: summed, they rank images as "
            "the true reward does. A weak penalty over-optimizes: it buys reward with digits that nobody can read.",
            paper="The derivation holds for diffusion models too (Appendix B, Lemma 2; nothing was run).",
            measured=f"Reference: reward {self.reference.reward:.2f}, read {self.reference.read.mean:.2f}. After "
            f"{last[0].steps} steps, gains against the reference from the same noise: {curve}.",
            reproduced=reproduced,
            command=self.COMMAND,
        )


@dataclass(frozen=True)
class Drawn:
    """Images of one policy; each measurement begins from the same noise.

    Attributes:
        images: Shape [N, 64].
        reward: True reward. Shape [N].
        ink: Shape [N].
        read: Whether the judging reader sees what was asked for. Shape [N].
        kl: Divergence from the reference along each trajectory, in nats. Shape [N].
        credit: Log-ratio of each pixel, summed over steps. Shape [N, 64].
        digits: What was asked for. Shape [N].
    """

    images: Float[np.ndarray, "N 64"]
    reward: Float[np.ndarray, " N"]
    ink: Float[np.ndarray, " N"]
    read: Bool[np.ndarray, " N"]
    kl: Float[np.ndarray, " N"]
    credit: Float[np.ndarray, "N 64"]
    digits: Int[np.ndarray, " N"]


@dataclass(frozen=True)
class Held:
    """Trajectories of the reference that no training saw, scored by one policy; neighbours are pairs.

    Attributes:
        returns: Log-ratio of each trajectory, in nats. Shape [2 N].
        kl: Divergence from the reference along each, in nats. Shape [2 N].
        reward: True reward. Shape [2 N].
        chosen: Which of each pair was preferred, 0 or 1. Shape [N].
    """

    returns: Float[np.ndarray, " M"]
    kl: Float[np.ndarray, " M"]
    reward: Float[np.ndarray, " M"]
    chosen: Int[np.ndarray, " N"]


def measure_diffusion(
    reference: Drawn,
    policies: Mapping[float, tuple[Mapping[int, Drawn], Held]],
    shown: Sequence[int],
    *,
    seed: int,
    steps: int,
    pairs: int,
    agreement: float,
    out: Path,
) -> Diffusion:
    """Compares policies with the reference and with the truth, and writes diffusion.json.

    Args:
        reference: What the reference draws.
        policies: Strength -> what the policy draws after so many steps, and how the last one scores held-out pairs.
        shown: Which images to show.
        seed: See `Diffusion`; so are the others.
        steps: See there.
        pairs: See there.
        agreement: See there.
        out: Folder for the record.
    """
    record = Diffusion(
        seed=seed,
        steps=steps,
        pairs=pairs,
        agreement=agreement,
        samples=len(reference.reward),
        reference=_point(0, reference, reference),
        images=_pictures(reference.images, shown),
        strengths=tuple(
            _strength(beta_dpo, drawn, held, reference, shown) for beta_dpo, (drawn, held) in sorted(policies.items())
        ),
    )
    record.write(out)
    return record


def _strength(
    beta_dpo: float, drawn: Mapping[int, Drawn], held: Held, reference: Drawn, shown: Sequence[int]
) -> Strength:
    last = drawn[max(drawn)]
    pairs = held.returns.reshape(-1, 2)
    rows = np.arange(len(pairs))
    mean_credit = np.stack([last.credit[last.digits == last.digits[row]].mean(0) for row in shown])
    # Two images of one digit are resampled together.
    correlation = rank_correlation(held.returns, held.reward, np.repeat(rows, 2))
    return Strength(
        beta_dpo=beta_dpo,
        points=tuple(_point(steps, drawn[steps], reference) for steps in sorted(drawn)),
        correlation=bootstrap(correlation, len(pairs)),
        chosen=mean_interval(pairs[rows, held.chosen]),
        rejected=mean_interval(pairs[rows, 1 - held.chosen]),
        expected=mean_interval(-held.kl),
        images=_pictures(last.images, shown),
        credit=_pictures(last.credit, shown),
        mean_credit=_pictures(mean_credit, range(len(shown))),
    )


def _point(steps: int, drawn: Drawn, reference: Drawn) -> Point:
    return Point(
        steps=steps,
        reward=mean_interval(drawn.reward),
        ink=mean_interval(drawn.ink),
        read=mean_interval(drawn.read.astype(float)),
        kl=mean_interval(drawn.kl),
        gain=mean_interval(drawn.reward - reference.reward),
        read_gain=mean_interval(drawn.read.astype(float) - reference.read),
    )


def _pictures(pixels: Float[np.ndarray, "N 64"], shown: Sequence[int]) -> tuple[Picture, ...]:
    return tuple(tuple(round(float(value), 3) for value in pixels[row]) for row in shown)
