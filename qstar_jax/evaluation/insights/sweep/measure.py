"""From models and prompts to sweep.json: responses in every way, their scores, and the verdicts of a judge."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import SweepConfig
from qstar_jax.config.paths import recorded
from qstar_jax.console import say
from qstar_jax.data.dropped import rows_by_reason
from qstar_jax.data.identity import examples_identity
from qstar_jax.decoding.generations_file import GenerationsFile, generation_identity, prompt_texts
from qstar_jax.errors import InputError
from qstar_jax.evaluation import trials
from qstar_jax.evaluation.insights.sweep.outcomes import Outcome, sweep_run
from qstar_jax.evaluation.insights.sweep.record import Sweep, SweepRun
from qstar_jax.evaluation.insights.sweep.settings import Setting, settings
from qstar_jax.evaluation.judges import Comparison, Judge, Verdict, make_judge
from qstar_jax.evaluation.judges.alpaca_eval import export
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.identity import write_identity
from qstar_jax.store.open import find_model, load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.store.sole_writer import sole_writer
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.tasks import TASKS, find


def measure_sweep(config: SweepConfig, console: Console) -> Sweep:
    """Decodes with every width, judges the responses, and writes comparisons.jsonl and sweep.json.

    Raises:
        InputError: If something that is named cannot be used.
    """
    # What options and existing files say is checked before any model is loaded.
    decoders, models = settings(config), _names(config.model)
    if config.data.eval is None:
        raise InputError("--data.eval is missing: name a file with prompts and the responses to compare with")
    for source in [*models.values(), *filter(None, [config.reference])]:
        find_model(source)
    out, mesh = Path(config.out), make_mesh(config.mesh)
    files = {
        name: {s: trials.open_generations(config, model, s.options(config), out / name / s.folder) for s in decoders}
        for name, model in models.items()
    }
    keep_programs()
    with use_mesh(mesh, config.compute.dtype), ExitStack() as held:
        judge = _judge(config, mesh, console)
        held.enter_context(sole_writer(out))  # makes the folder, so only once all else is settled
        entries = [_try_model(config, name, model, files[name], mesh, console) for name, model in models.items()]
        # All models at once: the cost of a judge is known before its first call.
        comparisons = [pair for entry in entries for pairs in entry.comparisons.values() for pair in pairs]
        verdicts = iter(judge(comparisons))
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out, models)
    with (out / "comparisons.jsonl").open("w", encoding="utf-8") as file:
        runs = [_write_comparisons(config, entry, verdicts, judge.name, file) for entry in entries]
    # Runs that differ in beta are named by it.
    betas = [run.beta for run in runs]
    if len(set(betas)) == len(betas) > 1:
        runs = [replace(run, name=f"beta {run.beta:g}") for run in runs]
    identities = {entry.name: entry.identity for entry in entries}
    write_identity(out / "sweep.json", {"options": recorded(config), "models": identities})
    sweep = Sweep(judge.name, len(entries[0].comparisons[decoders[0]]), config.seeds, tuple(runs))
    sweep.write(out)
    return sweep


def _names(model: list[str] | str) -> dict[str, str]:
    """Names each model by its folder, or by as many levels of folders as tell them apart."""
    models = [model] if isinstance(model, str) else model
    paths = [Path(source).resolve().parts[1:] for source in models]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = ["-".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, models, strict=True))
    raise InputError(f"--model {models}: expected one or several different runs")


def _remove_earlier(out: Path, models: Iterable[str]):
    """Removes the files of an earlier sweep, so that none of them stands beside the new ones."""
    for name in ("sweep.json", "sweep.png", "sweep.identity.json"):
        (out / name).unlink(missing_ok=True)
    for name in models:
        shutil.rmtree(out / "alpaca_eval" / name, ignore_errors=True)


def _judge(config: SweepConfig, mesh: Mesh, console: Console) -> Judge:
    built_in = find(config.data.eval)
    reward = built_in[0].true_reward if built_in else None
    return make_judge(
        config.judge,
        true_reward=(lambda pairs: [reward(*pair) for pair in pairs]) if reward else None,
        compute=config.compute,
        mesh=mesh,
        mesh_options=config.mesh,
        console=console,
    )


@dataclass(frozen=True)
class _Entry:
    """A model's responses before they are judged, its identity, and the rows that were not tried, by reason."""

    name: str
    model: str
    beta: float
    scored: dict[Setting, list[ScoredResponse]]
    comparisons: dict[Setting, list[Comparison]]
    identity: dict[str, Any]
    unused: dict[str, list[int]]


def _try_model(
    config: SweepConfig, name: str, model: str, files: dict[Setting, GenerationsFile], mesh: Mesh, console: Console
) -> _Entry:
    """Generates responses in every way, and scores them."""
    load = partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh)
    policy = load(model)
    reference = open_reference(policy, config.reference, model, load)
    beta = find_beta(policy, config.beta, model, "--beta")
    dates = [file.date for file in files.values() if file.date]  # a sweep is continued with the date of its beginning
    data = replace(config.data, date=dates[0]) if dates else config.data
    prompts, dataset = trials.read_trials(data, policy)
    say(console, dataset.report(policy.model, config.max_new_tokens))
    identity, texts = generation_identity(policy), prompt_texts(dataset, policy.tokenizer)
    for file in files.values():  # all of them before the first response
        file.check(identity, texts, dataset.date)
    size = config.batch_size
    responses = {
        setting: trials.generate_trials(file, policy, setting.options(config), dataset, size, mesh, console)
        for setting, file in files.items()
    }
    return _Entry(
        name,
        model,
        beta,
        trials.score_trials(responses, prompts, policy, reference, beta=beta, batch_size=size, mesh=mesh),
        {setting: trials.compare(records, prompts) for setting, records in responses.items()},
        identity | {"reference": reference.identity(), "beta": beta, "data": examples_identity(dataset.examples)},
        rows_by_reason(dataset.dropped),
    )


def _write_comparisons(
    config: SweepConfig, entry: _Entry, verdicts: Iterator[Verdict], judge: str, file: TextIO
) -> SweepRun:
    """Writes down how each response of a model was judged, and summarizes them."""
    outcomes = {}
    for setting, comparisons in entry.comparisons.items():
        judged = list(zip(comparisons, islice(verdicts, len(comparisons)), strict=True))
        outcomes[setting] = [
            _outcome(scored, comparison, verdict)
            for scored, (comparison, verdict) in zip(entry.scored[setting], judged, strict=True)
        ]
        for outcome, (comparison, verdict) in zip(outcomes[setting], judged, strict=True):
            parts = {**asdict(setting), **asdict(outcome), **asdict(comparison), "verdict": asdict(verdict)}
            file.write(json.dumps({"model": entry.name, **parts}, ensure_ascii=False) + "\n")
        if config.export:
            folder = Path(config.out) / "alpaca_eval" / entry.name / setting.folder
            names = {"generator": f"{entry.name} {setting.folder}", "baseline": "preferred", "annotator": judge}
            export(folder, comparisons, [verdict for _, verdict in judged], **names)
    return sweep_run(outcomes, name=entry.name, model=entry.model, beta=entry.beta, unused_rows=entry.unused)


def _outcome(scored: ScoredResponse, comparison: Comparison, verdict: Verdict) -> Outcome:
    # Prompts of a built-in task have a true reward in whatever file they stand.
    rewards = (task.true_reward(comparison.prompt, comparison.answer) for task in TASKS if task.true_reward)
    return Outcome(
        row=scored.row,
        win=verdict.win,
        length=len(scored.token_ids),
        logp=float(sum(scored.logp)),
        implicit_reward=scored.total_reward,
        true_reward=next((reward for reward in rewards if reward is not None), None),
        truncated=scored.truncated,
    )
