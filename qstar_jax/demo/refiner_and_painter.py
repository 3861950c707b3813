"""A language model and a painter, one preference: `python -m qstar_jax.demo.refiner_and_painter --out runs/drawing`.

A refiner says what to draw and a painter draws it, both with planted faults; preferences are between images only. Arms:
jointly (Eq. 18), one model only, both by losses of their own, and fine-tuning on winners. Measured: the true reward at
equal KL, and whether the implicit reward, split by model, tells which one is to blame for a bad image.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from qstar_jax.evaluation.blame import measure_blame, reward_at_kl
from qstar_jax.pipeline import Meter, Point, PreferenceBatch, Stage, make_arms, sample, stage_rewards, train_arm
from qstar_jax.pipeline.stage import Outputs
from qstar_jax.store.files import write_json
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.tasks import digits, drawing
from qstar_jax.tasks.drawing import words
from qstar_jax.training.source import Source

NAMES = ("refiner", "painter")
BETA = 0.5
PAIRS, STEPS, BATCH = 4000, 160, 64
RATES = {"refiner": 3e-4, "painter": 1e-5}  # so that both move in as many steps
MEASURED, MEASURE_EVERY = 800, 20
KLS = (0.3, 0.6)  # nats, at which arms are compared


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


def prepare(seed: int) -> Setting:
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
    pairs = drawing.draw_pairs(refiner, painter, tuple(references.values()), judges, keys[2], count=PAIRS)
    return Setting(refiner, painter, references, judges, pairs, seed)


def run_arm(setting: Setting, name: str) -> dict[str, Any]:
    """Trains one arm, and measures its curve and whom its rewards blame."""
    prompts = np.resize(words.ALL_PROMPTS, (MEASURED, words.PROMPT))
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
        steps=STEPS,
        measure_every=MEASURE_EVERY,
    )
    return {"curve": [asdict(point) for point in curve], "blame": _blame(setting, params, prompts)}


def _blame(setting: Setting, params: dict[str, Any], prompts: np.ndarray) -> dict[str, Any]:
    """Splits the rewards of fresh runs of the references among the models, and compares with who is at fault."""
    stages = [replace(stage, beta=1.0) for stage in setting.stages(setting.references)]
    key = jax.random.key(2000 + setting.seed)
    outputs = sample(stages, [setting.references[name] for name in NAMES], key, prompts)
    log_ratios = stage_rewards(stages, [params[name] for name in NAMES], prompts, outputs)
    requests, states = map(np.asarray, outputs)
    return asdict(measure_blame(NAMES, log_ratios, setting.judges.faults(prompts, requests, states[:, 0])))


def summarize(out: Path, seeds: Sequence[int], arms: Sequence[str]) -> Table:
    """Puts stored arms in a table: reward at equal KL, at the end, and blame; means over seeds, lowest and highest."""
    table = Table(
        "arm",
        "before",
        *(f"at KL {kl:g}" for kl in KLS),
        "at the end",
        "its KL",
        "refiner's faults",
        "painter's",
        "whose",
    )
    for arm in arms:
        records = [json.loads(_file(out, arm, seed).read_text(encoding="utf-8")) for seed in seeds]
        curves = [[Point(**point | {"kl": tuple(point["kl"])}) for point in record["curve"]] for record in records]
        blame = [record["blame"] for record in records]
        table.add_row(
            arm,
            _spread([curve[0].reward for curve in curves]),
            *(_spread([reward_at_kl(curve, kl) for curve in curves]) for kl in KLS),
            _spread([curve[-1].reward for curve in curves]),
            _spread([curve[-1].total_kl for curve in curves]),
            *(_spread([one["finds"][name]["mean"] for one in blame]) for name in NAMES),
            _spread([one["tells"]["refiner"]["mean"] for one in blame]),
        )
    return table


def _spread(values: Sequence[float]) -> str:
    return "-" if np.isnan(values).any() else f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _file(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(' ', '-')}-{seed}.json"


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
            if not _file(out, arm, seed).exists():
                setting = setting or prepare(seed)
                write_json(_file(out, arm, seed), run_arm(setting, arm))
                console.print(f"seed {seed}: {arm}")
    console.print(summarize(out, arguments.seeds, arguments.arms))


if __name__ == "__main__":
    main()
