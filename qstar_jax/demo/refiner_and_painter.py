"""A language model and a painter, one preference: `python -m qstar_jax.demo.refiner_and_painter --out runs/drawing`.

A refiner says what to draw and a painter draws it, both with planted faults; preferences are between images only. Arms:
jointly (Eq. 18), one model only, both by losses of their own, and fine-tuning on winners. Measured: the true reward at
equal KL, and whether the implicit reward, split by model, tells which one is to blame for a bad image.
"""

import argparse
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from qstar_jax.demo.arms_table import arm_file, summarize
from qstar_jax.evaluation.blame import Blame, measure_blame
from qstar_jax.pipeline import Meter, Point, PreferenceBatch, Stage, make_arms, sample, stage_rewards, train_arm
from qstar_jax.pipeline.stage import Outputs
from qstar_jax.store.files import write_json
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.tasks import digits, drawing
from qstar_jax.tasks.drawing import words
from qstar_jax.training.source import Source

NAMES = ("refiner", "painter")
BETA = 0.5
BATCH = 64
RATES = {"refiner": 3e-4, "painter": 1e-5}  # so that both move in as many steps
KLS = (0.3, 0.6)  # nats, at which arms are compared
SCORE = "reward"  # the implicit one, which blames


@dataclass(frozen=True)
class Size:
    """How much is drawn, trained and measured.

    Attributes:
        pairs: Pairs to train on.
        steps: Optimizer steps of an arm.
        measured: Runs behind each measurement.
        measure_every: Steps between measurements.
    """

    pairs: int = 4000
    steps: int = 160
    measured: int = 800
    measure_every: int = 20


@dataclass(frozen=True)
class PairSource(Source):
    """Batches of pairs, drawn with replacement.

    Attributes:
        pairs: The pairs.
        seed: Fixes the batches.
    """

    pairs: drawing.Pairs
    seed: int
    name = "pairs of drawings"

    def at_step(self, step: int, state: Any = None) -> PreferenceBatch:
        """The batch of a step, whatever the state."""
        pairs, rows = self.pairs, np.random.default_rng((self.seed, step)).integers(0, len(self.pairs.prompts), BATCH)
        chosen, rejected = (tuple(output[rows] for output in run) for run in (pairs.chosen, pairs.rejected))
        return PreferenceBatch(pairs.prompts[rows], chosen, rejected, np.ones(BATCH, np.float32))


@dataclass(frozen=True)
class Setting:
    """What all arms of a seed share: both models, parameters of their references by name, judges, and pairs."""

    refiner: drawing.Refiner
    painter: drawing.Painter
    references: dict[str, Any]
    judges: drawing.Judges
    pairs: drawing.Pairs
    seed: int

    def stages(self, references: dict[str, Any]) -> tuple[Stage, ...]:
        """Makes the stages of the pipeline."""
        return tuple(
            Stage(name, partial(model.log_ratio, references[name]), model.sample, BETA)
            for name, model in zip(NAMES, (self.refiner, self.painter), strict=True)
        )

    def true_reward(self, prompts: np.ndarray, outputs: Outputs) -> np.ndarray:
        """The known reward of the images."""
        return self.judges.true_reward(prompts, np.asarray(outputs[-1][:, 0]))


def prepare(seed: int, size: Size = Size()) -> Setting:
    """Fits both references with their faults, and labels pairs of images that they make.

    Raises:
        InputError: scikit-learn is not installed.
    """
    data = digits.load_images()
    judges = drawing.Judges.fit(data)
    refiner, painter = drawing.Refiner(drawing.make_model()), drawing.Painter(drawing.make_schedule())
    keys = jax.random.split(jax.random.key(seed), 3)
    references = {
        "refiner": drawing.fit_refiner(refiner.model, keys[0])[0],
        "painter": drawing.fit_painter(data, painter.schedule, keys[1], seed=seed)[0],
    }
    pairs = drawing.draw_pairs(refiner, painter, tuple(references.values()), judges, keys[2], count=size.pairs)
    return Setting(refiner, painter, references, judges, pairs, seed)


def train_and_blame(setting: Setting, name: str, size: Size) -> tuple[list[Point], Blame]:
    """Trains one arm; returns its curve, and whom its rewards blame."""
    prompts = np.resize(words.ALL_PROMPTS, (size.measured, words.PROMPT))
    meter = Meter(setting.stages, [prompts], setting.true_reward, jax.random.key(1000 + setting.seed))
    optimizer = optax.multi_transform(
        {stage: optax.adam(optax.linear_schedule(0, rate, 10)) for stage, rate in RATES.items()},
        lambda params: {stage: stage for stage in params},
    )
    params, curve = train_arm(
        meter,
        setting.references,
        setting.references,
        PairSource(setting.pairs, setting.seed),
        make_arms(NAMES)[name],
        optimizer=optimizer,
        steps=size.steps,
        measure_every=size.measure_every,
    )
    return curve, _blame(setting, params, prompts)


def run_arm(setting: Setting, name: str, size: Size = Size()) -> dict[str, Any]:
    """Trains one arm, and returns its curve and its blame as JSON has them."""
    curve, blame = train_and_blame(setting, name, size)
    return {"curve": [asdict(point) for point in curve], "blame": {SCORE: asdict(blame)}}


def _blame(setting: Setting, params: dict[str, Any], prompts: np.ndarray) -> Blame:
    """Splits the rewards of fresh runs of the references among the models, and compares with who is at fault."""
    stages = [replace(stage, beta=1.0) for stage in setting.stages(setting.references)]
    key = jax.random.key(2000 + setting.seed)
    outputs = sample(stages, [setting.references[name] for name in NAMES], key, prompts)
    log_ratios = stage_rewards(stages, [params[name] for name in NAMES], prompts, outputs)
    requests, states = map(np.asarray, outputs)
    return measure_blame(NAMES, log_ratios, setting.judges.faults(prompts, requests, states[:, 0]))


def main():
    """Runs all arms and seeds that are not in the folder yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(make_arms(NAMES)), choices=list(make_arms(NAMES)))
    arguments = parser.parse_args()
    out, console = Path(arguments.out), Console()
    out.mkdir(parents=True, exist_ok=True)
    keep_programs()
    for seed in arguments.seeds:
        setting = None
        for arm in arguments.arms:
            if not arm_file(out, arm, seed).exists():
                setting = setting or prepare(seed)
                write_json(arm_file(out, arm, seed), run_arm(setting, arm))
                console.print(f"seed {seed}: {arm}")
    console.print(summarize(out, NAMES, arguments.seeds, arguments.arms, KLS, SCORE))


if __name__ == "__main__":
    main()
