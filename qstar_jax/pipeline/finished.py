"""What `qstar pipeline` does with pipelines as they are: rows of their runs, and scores that split rewards by stage."""

import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import PipelineConfig
from qstar_jax.console import say, track
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.reading import read_rows
from qstar_jax.errors import InputError
from qstar_jax.pipeline.evaluator import reward_of
from qstar_jax.pipeline.plan import PipelinePlan, make_pipeline_plan
from qstar_jax.pipeline.rows import PairFeeder, PairRow, read_pairs, row_examples
from qstar_jax.pipeline.sampling import draw_runs, make_rows
from qstar_jax.pipeline.stage import pair_rewards
from qstar_jax.pipeline.start import language_stages
from qstar_jax.pipeline.template import PROMPT
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.files import write_atomically, write_json
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import open_reference
from qstar_jax.store.user_cache import keep_programs

PAIRS, SCORES = "pairs.jsonl", "scores.jsonl"


def sample_pipeline(config: PipelineConfig, console: Console | None = None) -> list[dict[str, Any]]:
    """Runs a pipeline twice for each prompt, and writes rows of both to pairs.jsonl.

    Args:
        config: The options.
        console: Where to show progress; the standard output by default.

    Returns:
        The rows.

    Raises:
        InputError: If a model, the prompts or the options cannot be used, or no two runs can be compared.
    """
    console, plan = console or Console(), make_pipeline_plan(config)
    samples, mesh = config.samples, make_mesh(config.mesh)
    label = samples.label or ("none" if plan.task is None else "bradley_terry")
    keep_programs()
    with use_mesh(mesh, config.compute.dtype):
        prompts, models = _read_prompts(plan), _load(plan, mesh)
        stages = language_stages(plan, models, mesh, temperature=samples.temperature)
        params = {name: loaded.params for name, loaded in models.items()}

        def draw(number: int) -> list:
            key = jax.random.fold_in(jax.random.key(samples.seed), number)
            sizes = {"batch_size": samples.batch_size, "track": partial(track, console)}
            return draw_runs(stages, params, prompts, key=key, **sizes)

        reward = None if plan.task is None else (lambda prompt, text: reward_of(plan, prompt, text))
        rows, left_out = make_rows(prompts, draw(0), draw(1), reward=reward, label=label, seed=samples.seed)
    for reason, count in left_out.items():
        say(console, f"{count} of {len(prompts)} pairs are left out: {reason}")
    if not rows:
        raise InputError(f"{config.data.prompts}: no pair of runs is left ({', '.join(left_out)})")
    if jax.process_index() == 0:
        _write_lines(plan, PAIRS, rows)
        todo = "; set better to 0 or 1 in each that you compare" if label == "none" else ""
        say(console, f"{plan.out / PAIRS}: {len(rows)} rows{todo}")
    return rows


def score_pipeline(config: PipelineConfig, console: Console | None = None) -> dict[str, Any]:
    """Splits the implicit rewards of rows among the stages of a finished run, and says which stage is to blame.

    Args:
        config: The options.
        console: Where to show progress; the standard output by default.

    Returns:
        The summary that is also written to summary.json; scores.jsonl has a line for each row.

    Raises:
        InputError: If a model, the rows or the options cannot be used.
    """
    console, plan = console or Console(), make_pipeline_plan(config)
    mesh = make_mesh(config.mesh)
    keep_programs()
    with use_mesh(mesh, config.compute.dtype):
        names = [stage.name for stage in plan.stages]
        trained = [stage.name for stage in plan.stages if stage.train]
        rows = read_pairs(config.data.eval, names, config.data.max_eval_rows)
        models = _load(plan, mesh, trained)
        references = {name: _reference(plan, loaded, mesh) for name, loaded in models.items()}
        stages = language_stages(plan, models, mesh, temperature=1.0)
        made = [stage.stage(references.get(stage.name)) for stage in stages]
        own = [models[name].params if name in trained else None for name in names]
        examples = row_examples(stages, rows, config.data.eval, trained=trained)
        size = config.train.eval_batch_size or config.train.batch_size
        feeder = PairFeeder(examples, config.data.eval, size, mesh, config.data.layout, "train.eval_batch_size")
        batches = track(console, feeder.in_order(), "rewards by stage", feeder.batches)
        # Stages compile programs of their own, which both runs of a pair share.
        rewards = np.concatenate(
            [jax.device_get(pair_rewards(made, own, batch.prompt, batch.chosen, batch.rejected)) for batch in batches]
        )
    lines = [_line(row, names, trained, one) for row, one in zip(rows, rewards[: len(rows)], strict=True)]
    summary = _summary(lines, names)
    if jax.process_index() == 0:
        _write_lines(plan, SCORES, lines)
        write_json(plan.out / "summary.json", summary)
        _print(summary, console)
        say(console, f"{plan.out / SCORES}: {len(lines)} rows")
    return summary


def _read_prompts(plan: PipelinePlan) -> list[str]:
    data, prompts = plan.config.data, []
    for index, row in enumerate(read_rows(data.prompts, data.split, data.max_prompts)):
        if isinstance(row, BadRow):
            raise InputError(f"{data.prompts} row {index + 1}: {row.fault}")
        if not isinstance(row, dict) or not isinstance(row.get(PROMPT), str):
            raise InputError(f"{data.prompts} row {index + 1}: no text in column {PROMPT!r}")
        prompts.append(row[PROMPT])
    return prompts


def _load(plan: PipelinePlan, mesh: Mesh, names: Iterable[str] | None = None) -> dict[str, LoadedModel]:
    """Opens the models of some stages, of all by default."""
    config = plan.config
    wanted = [stage for stage in plan.stages if names is None or stage.name in names]
    return {stage.name: load_model(stage.model, config.compute, mesh, config.mesh) for stage in wanted}


def _reference(plan: PipelinePlan, loaded: LoadedModel, mesh: Mesh) -> Any:
    config = plan.config
    load = partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh)
    return open_reference(loaded, None, str(loaded.source), load).params


def _line(row: PairRow, names: list[str], trained: list[str], rewards: np.ndarray) -> dict[str, Any]:
    """One line of scores.jsonl."""
    line: dict[str, Any] = {"row": row.row, "prompt": row.prompt}
    roles = ("chosen", "rejected") if row.labelled else ("first", "second")
    for role, texts, one in zip(roles, row.runs, rewards, strict=True):
        by_stage = dict(zip(names, one.tolist(), strict=True))
        line[role] = {"texts": texts, "rewards": by_stage, "total": float(one.sum())}
    if row.labelled:
        # What the rejected run lacks, it lacks most where the margin is largest.
        # A stage that was not trained earns nothing, and cannot be told.
        margins = dict(zip(names, (rewards[0] - rewards[1]).tolist(), strict=True))
        line |= {"margins": margins, "blame": max(trained, key=margins.get)}
    return line


def _summary(lines: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    compared = [line for line in lines if "margins" in line]
    summary: dict[str, Any] = {"rows": len(lines), "compared": len(compared)}
    if compared:
        margins = np.array([list(line["margins"].values()) for line in compared])
        blamed = Counter(line["blame"] for line in compared)
        summary |= {
            "accuracy": float((margins.sum(1) > 0).mean()),
            "margin": {name: float(margin) for name, margin in zip(names, margins.mean(0), strict=True)},
            "blamed": {name: blamed[name] for name in names},
        }
    return summary


def _print(summary: dict[str, Any], console: Console):
    if summary["compared"]:
        say(console, f"{summary['compared']} compared rows, {summary['accuracy']:.1%} ranked as labelled")
        for name, margin in summary["margin"].items():
            blamed = summary["blamed"][name]
            say(console, f"  {name}: mean margin {margin:+.4g}, to blame for {blamed} of the rejected runs")


def _write_lines(plan: PipelinePlan, name: str, lines: list[dict[str, Any]]):
    plan.out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(plan.out / name, text.encode())
