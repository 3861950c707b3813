"""The insight `diffusion`: a model that draws digits, trained on preferences between its images at four strengths."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.rule import Rule

from qstar_jax import diffusion
from qstar_jax.config import DemoConfig, ReportConfig
from qstar_jax.diffusion import StepScores
from qstar_jax.evaluation.insights.diffusion import Drawn, Held, measure_diffusion
from qstar_jax.report.insights import show
from qstar_jax.report.summary import write_report
from qstar_jax.tasks import digits
from qstar_jax.tasks.digits.fitting import Pairs, fit_denoiser, fit_dpo

STEPS = 100
LAST_BETA = 0.1  # of the linear schedule: little is left of an image after a hundred steps
STRENGTHS = (20.0, 100.0, 500.0, 2000.0)
_AT_ONCE = 1000  # images drawn or scored together


@dataclass(frozen=True)
class Size:
    """How much is trained and drawn.

    Attributes:
        base: Steps of fitting the reference to images.
        stops: Steps of DPO after which a policy is measured.
        pairs: Pairs to train on.
        samples: Images per measurement, a multiple of 10; as many more of the reference are held out.
    """

    base: int = 4000
    stops: tuple[int, ...] = (50, 100, 200)
    pairs: int = 4000
    samples: int = 500


def run(config: DemoConfig, console: Console, size: Size | None = None) -> dict:
    """Trains and measures, writes diffusion/ and report.html, and returns its summary.json."""
    began, out, size = time.perf_counter(), Path(config.out), size or Size()
    studio = _Studio(digits.load_images(), jax.random.key(config.seed))
    console.print(Rule("A diffusion model of digits"))
    error = studio.fit(size.base)
    console.print(f"{size.base:,} steps, squared error per pixel {error:.3f}")
    pairs, agreement = studio.make_pairs(size.pairs, config.seed)
    console.print(f"{size.pairs:,} pairs of its images; {agreement:.0%} of the labels agree with the true reward")
    asked = np.arange(size.samples) % 10
    reference = studio.measure(studio.reference, asked)
    held_states, chosen = studio.hold_out(asked, config.seed)
    policies = {}
    for number, beta_dpo in enumerate(STRENGTHS):
        console.print(Rule(f"Diffusion-DPO, beta_dpo {beta_dpo:g}"))
        drawn, key = {}, jax.random.fold_in(studio.keys["dpo"], number)
        for steps, params in fit_dpo(
            studio.reference, studio.schedule, pairs, key, beta_dpo=beta_dpo, stops=size.stops
        ):
            drawn[steps] = one = studio.measure(params, asked)
            console.print(
                f"{steps} steps: reward {one.reward.mean():.2f} ({reference.reward.mean():.2f} before), "
                f"KL {one.kl.mean():.1f} nats, read {one.read.mean():.2f}"
            )
        policies[beta_dpo] = drawn, studio.held(params, held_states, asked, chosen)
    record = measure_diffusion(
        reference,
        policies,
        range(10),
        seed=config.seed,
        steps=STEPS,
        pairs=size.pairs,
        agreement=agreement,
        out=out / "diffusion",
    )
    show(record, out / "diffusion", console)
    console.print(Rule("What it showed"))
    report = ReportConfig(out=str(out), diffusion=str(out / "diffusion"))
    return write_report(report, console, seed=config.seed, size=asdict(size), seconds=time.perf_counter() - began)


class _Studio:
    """A model that draws, readers that judge, and keys for everything that is drawn."""

    def __init__(self, data: digits.Digits, key: jax.Array):
        self.data, self.readers = data, digits.Readers.fit(data)
        self.schedule = diffusion.linear_schedule(STEPS, last=LAST_BETA)
        names = ("init", "fit", "pairs", "held", "samples", "dpo")
        self.keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        self.reference = digits.init_denoiser(self.keys["init"])
        self._sample = jax.jit(
            lambda params, asked, key: diffusion.sample(
                self.schedule, digits.conditioned(params, digits.one_hot(asked)), key, (len(asked), digits.PIXELS)
            )
        )
        self._score = jax.jit(
            lambda params, reference, asked, states: _summed(
                diffusion.score_steps(
                    self.schedule,
                    digits.conditioned(params, digits.one_hot(asked)),
                    digits.conditioned(reference, digits.one_hot(asked)),
                    states,
                )
            )
        )

    def fit(self, steps: int) -> float:
        """Fits the reference to the images; returns its error."""
        self.reference, error = fit_denoiser(
            self.reference,
            self.schedule,
            self.data.images,
            digits.one_hot(self.data.digits),
            self.keys["fit"],
            steps=steps,
        )
        return error

    def make_pairs(self, count: int, seed: int) -> tuple[Pairs, float]:
        """Draws the two images of each pair from the reference, and labels them; also the share of right labels."""
        asked = np.repeat(np.arange(count) % 10, 2)
        parts = [asked[start : start + _AT_ONCE] for start in range(0, len(asked), _AT_ONCE)]
        keys = jax.random.split(self.keys["pairs"], len(parts))
        draw = partial(self._sample, self.reference)
        images = np.concatenate([draw(jnp.asarray(part), key)[0] for part, key in zip(parts, keys, strict=True)])
        rewards = digits.true_reward(self.readers, images, asked)
        chosen = _labels(rewards, seed)
        rows = np.arange(count)
        agreement = float(np.mean(chosen == (rewards.reshape(-1, 2)[:, 1] > rewards.reshape(-1, 2)[:, 0])))
        images = images.reshape(count, 2, -1)
        return Pairs(
            np.stack([images[rows, chosen], images[rows, 1 - chosen]], 1), digits.one_hot(asked[::2])
        ), agreement

    def hold_out(self, asked: np.ndarray, seed: int) -> tuple[jax.Array, np.ndarray]:
        """Draws trajectories of the reference, whose neighbours are pairs of one digit, and labels them."""
        states = self._sample(self.reference, jnp.asarray(_by_pairs(asked)), self.keys["held"])
        rewards = digits.true_reward(self.readers, np.asarray(states[0]), _by_pairs(asked))
        return states, _labels(rewards, seed + 1)

    def held(self, params, states: jax.Array, asked: np.ndarray, chosen: np.ndarray) -> Held:
        """Scores held-out trajectories."""
        asked = _by_pairs(asked)
        credit, kl = map(np.asarray, self._score(params, self.reference, jnp.asarray(asked), states))
        return Held(credit.sum(-1), kl, digits.true_reward(self.readers, np.asarray(states[0]), asked), chosen)

    def measure(self, params, asked: np.ndarray) -> Drawn:
        """Draws images, always from the same noise, and judges them."""
        states = self._sample(params, jnp.asarray(asked), self.keys["samples"])
        credit, kl = map(np.asarray, self._score(params, self.reference, jnp.asarray(asked), states))
        images = np.asarray(states[0])
        return Drawn(
            images=images,
            reward=digits.true_reward(self.readers, images, asked),
            ink=digits.ink(images),
            read=self.readers.reads(images, asked),
            kl=kl,
            credit=credit,
            digits=asked,
        )


def _summed(scores: StepScores) -> tuple[jax.Array, jax.Array]:
    """Log-ratios of pixels over all steps, [B, 64], and divergences of trajectories, [B]."""
    return scores.log_ratios.sum(0), scores.kls.sum((0, 2))


def _labels(rewards: np.ndarray, seed: int) -> np.ndarray:
    """Which of two neighbours is preferred, 0 or 1, drawn by Bradley-Terry."""
    first, second = rewards.reshape(-1, 2).T
    return (np.random.default_rng(seed).random(len(first)) < 1 / (1 + np.exp(first - second))).astype(int)


def _by_pairs(asked: np.ndarray) -> np.ndarray:
    return np.repeat(asked[: len(asked) // 2], 2)
