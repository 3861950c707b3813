"""Two language models, one preference: `python -m qstar_jax.demo.two_writers --out runs/two-writers`.

A writer of lists and a writer of summaries, both with planted faults, learn from preferences between summaries only.
Arms: jointly (Eq. 18), one writer only, both by losses of their own, and fine-tuning on winners. Measured: the true
reward at equal KL, and whether the implicit reward, split by writer, tells who is to blame.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    MeshOptions,
    OptimizerOptions,
    PipelineConfig,
    SftConfig,
    StageOptions,
    TrainOptions,
)
from qstar_jax.config.pipeline import PipelineDataOptions
from qstar_jax.console import say
from qstar_jax.data.batches import Batch
from qstar_jax.demo.arms_table import arm_file, summarize
from qstar_jax.evaluation.blame import Blame, measure_blame
from qstar_jax.mdp import TokenScores
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.pipeline import LanguageStage, Meter, make_arms, sample, stage_rewards, train_arm
from qstar_jax.pipeline.plan import make_pipeline_plan
from qstar_jax.pipeline.rows import PairFeeder, PairRow, row_examples
from qstar_jax.pipeline.sampling import draw_runs, make_rows
from qstar_jax.pipeline.stage import Outputs
from qstar_jax.pipeline.start import language_stages
from qstar_jax.pipeline.state import by_stage
from qstar_jax.scoring import score_policy
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.files import write_json
from qstar_jax.store.open import load_model
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.tasks.tiny_tldr import BASE, TASK, read_post
from qstar_jax.tasks.tiny_tldr.outlines import faults, outline_rows, prompts, text_rows
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.run import train
from qstar_jax.training.source import DatasetSource

NAMES = ("outline", "text")
BETA = 0.3
SFT = {"steps": 100, "batch_size": 64, "accumulate": 16}
PAIRS, STEPS, BATCH, MICRO_BATCHES = 480, 20, 24, 3
MEASURED, MEASURE_EVERY, BLAMED = 128, 10, 384
RATE = 2e-4
KLS = (0.3, 0.45)  # nats, at which arms are compared
COMPUTE = ComputeOptions(attention="dense")


@dataclass(frozen=True)
class Setting:
    """What all arms of a seed share.

    Attributes:
        stages: Both writers.
        params: Parameters of the references, by name.
        rows: Pairs of runs.
        seed: Seed of posts, runs, labels and batches.
        mesh: Devices.
    """

    stages: tuple[LanguageStage, ...]
    params: dict[str, Params]
    rows: list[PairRow]
    seed: int
    mesh: Mesh

    def of(self, ref_params: dict[str, Params]) -> list:
        """Makes the stages of a pipeline."""
        return [stage.stage(ref_params[stage.name]) for stage in self.stages]


def reference(out: Path, name: str, console: Console) -> Path:
    """Fine-tunes a writer with its faults on the base model; does nothing if that was done before."""
    folder = out / f"sft-{name}"
    if not (folder / "summary.json").exists():
        make = {"outline": outline_rows, "text": text_rows}[name]
        rows = make(SFT["steps"] * SFT["batch_size"], seed=0)
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = DataOptions(train=str(file), max_length=128, max_prompt_length=88, layout="shared")
        optimizer = OptimizerOptions(learning_rate=2e-3, warmup_steps=10, schedule="cosine")
        options = {"data": data, "compute": COMPUTE, "optimizer": optimizer, "train": TrainOptions(**SFT)}
        train(SftConfig(model=str(BASE), out=str(folder), **options, resume=True), console)
    return folder


def prepare(out: Path, seed: int, mesh: Mesh, console: Console) -> Setting:
    """Opens both writers, and runs them twice on each post for labels by the true reward of the summaries."""
    common = {"max_new_tokens": 40, "max_length": 160, "max_prompt_length": 100, "beta": BETA}
    folders = {name: reference(out, name, console) for name in NAMES}
    first, second = (str(folders[name]) for name in NAMES)
    config = PipelineConfig(
        out=str(out / "unused"),
        mode="sample",
        stages=[
            StageOptions("outline", first, **common),
            StageOptions("text", second, template="{outline}\nTL;DR:", **common),
        ],
        data=PipelineDataOptions(prompts=TASK.source),
    )
    plan = make_pipeline_plan(config)
    loaded = {stage.name: load_model(stage.model, COMPUTE, mesh, MeshOptions()) for stage in config.stages}
    stages = language_stages(plan, loaded, mesh, temperature=1.0)
    params = {name: model.params for name, model in loaded.items()}
    posts = prompts(PAIRS, seed)
    draw = partial(draw_runs, stages, params, posts, batch_size=MEASURED)
    runs = [draw(key=jax.random.fold_in(jax.random.key(seed), number)) for number in (0, 1)]
    rows, left_out = make_rows(posts, *runs, reward=TASK.true_reward, label="bradley_terry", seed=seed)
    say(console, f"seed {seed}: {len(rows)} pairs; left out: {left_out}")
    pairs = [PairRow(i, row["prompt"], (row["chosen"], row["rejected"])) for i, row in enumerate(rows)]
    return Setting(stages, params, pairs, seed, mesh)


def run_arm(setting: Setting, name: str) -> dict[str, Any]:
    """Trains one arm, and measures its curve and whom its rewards blame."""
    examples = row_examples(setting.stages, setting.rows, "pairs")
    feeder = PairFeeder(examples, "pairs", BATCH, setting.mesh, "shared", accumulate=MICRO_BATCHES)
    posts = prompts(MEASURED, seed=1000 + setting.seed)

    def true_reward(batch: list[str], outputs: Outputs) -> np.ndarray:
        texts = setting.stages[-1].read(outputs[-1])
        return np.array([TASK.true_reward(*both) for both in zip(batch, texts, strict=True)])

    meter = Meter(setting.of, [posts], true_reward, jax.random.key(setting.seed))
    options = OptimizerOptions(learning_rate=RATE, warmup_steps=5, schedule="constant")
    params, curve = train_arm(
        meter,
        setting.params,
        setting.params,
        DatasetSource(feeder, setting.seed),
        make_arms(NAMES)[name],
        optimizer=by_stage(make_optimizer(options, STEPS)),
        steps=STEPS,
        measure_every=MEASURE_EVERY,
        accumulate=MICRO_BATCHES,
    )
    return {"curve": [asdict(point) for point in curve], "blame": _blame(setting, params)}


def _blame(setting: Setting, params: dict[str, Params]) -> dict[str, Any]:
    """Scores fresh runs of the references by stage, and compares with who is at fault."""
    posts, references = prompts(BLAMED, seed=2000 + setting.seed), setting.params
    stages, scored, guilty = setting.of(references), [], []
    for first in range(0, BLAMED, MEASURED):
        part = posts[first : first + MEASURED]
        key = jax.random.fold_in(jax.random.key(setting.seed + 1), first)
        outputs = sample(stages, [references[name] for name in NAMES], key, part)
        unit = [replace(stage, beta=1.0) for stage in stages]
        log_ratios = np.asarray(stage_rewards(unit, [params[name] for name in NAMES], part, outputs))
        # Controls that need no training: log pi_ref, summed and per token.
        plain = [
            _log_prob(one.model, references[one.name], out) for one, out in zip(setting.stages, outputs, strict=True)
        ]
        sums = np.stack([np.asarray(scores.logp.sum((1, 2))) for scores in plain], -1)
        lengths = np.stack([np.asarray(scores.mask.sum((1, 2))) for scores in plain], -1)
        scored.append({"reward": log_ratios, "log pi_ref": sums, "log pi_ref per token": sums / lengths})
        texts = [stage.read(output) for stage, output in zip(setting.stages, outputs, strict=True)]
        guilty += [faults(read_post(prompt), *both) for prompt, *both in zip(part, *texts, strict=True)]
    measured: dict[str, Blame] = {
        score: measure_blame(NAMES, np.concatenate([one[score] for one in scored]), np.array(guilty))
        for score in scored[0]
    }
    return {score: asdict(blame) for score, blame in measured.items()}


@partial(jax.jit, static_argnums=0)
def _log_prob(model: CausalLM, params: Params, batch: Batch) -> TokenScores:
    return score_policy(model, params, batch)


def main():
    """Runs all arms and seeds that are not in the folder yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(make_arms(NAMES)))
    arguments = parser.parse_args()
    out, console, mesh = Path(arguments.out), Console(), make_mesh(MeshOptions())
    keep_programs()
    with use_mesh(mesh, "float32"):
        for seed in arguments.seeds:
            setting = None
            for arm in arguments.arms:
                file = arm_file(out, arm, seed)
                if not file.exists():
                    setting = setting or prepare(out, seed, mesh, console)
                    record = run_arm(setting, arm)
                    write_json(file, record)
                    last = record["curve"][-1]
                    say(
                        console,
                        f"{file}: reward {record['curve'][0]['reward']:.3f} -> {last['reward']:.3f}, KL {last['kl']}",
                    )
    console.print(summarize(out, NAMES, arguments.seeds, arguments.arms, KLS, "reward"))


if __name__ == "__main__":
    main()
