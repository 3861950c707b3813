"""`qstar sweep`."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from qstar_jax.config import SweepConfig
from qstar_jax.data.dropped import rows_by_reason
from qstar_jax.decoding.answers_file import AnswersFile, answers_identity, prompt_texts
from qstar_jax.errors import InputError
from qstar_jax.evaluation import trials
from qstar_jax.evaluation.insights.sweep import Setting, settings, sweep_run
from qstar_jax.evaluation.judges import Comparison, Judge, Verdict, make_judge
from qstar_jax.evaluation.judges.alpaca_eval import export
from qstar_jax.evaluation.judges.base import Track
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.report.figures import write_figures
from qstar_jax.report.insights_terminal import print_sweep
from qstar_jax.sharding import make_mesh
from qstar_jax.store.identity import examples_identity, write_identity
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.tasks.tiny_tldr import reward_of_text


def run(config: SweepConfig):
    """Decodes with every width, judges the answers, and writes what came out."""
    console = Console()
    print_sweep(sweep(config, console), console)
    console.print(f"sweep.json, sweep.png, comparisons.jsonl: {config.out}", markup=False, soft_wrap=True)


def sweep(config: SweepConfig, console: Console) -> dict:
    """Runs a sweep; writes answers, comparisons.jsonl, sweep.json and sweep.png.

    Args:
        config: The sweep.
        console: Where to show progress.

    Returns:
        The record that sweep.json holds.

    Raises:
        InputError: If something that is named cannot be used.
    """
    tried, models = settings(config), _named(config.model)
    if config.data.eval is None:
        raise InputError("--data.eval is missing: name a file with prompts and the answers to compare with")
    out, mesh = Path(config.out), make_mesh(config.mesh)
    show = _tracker(console)
    files = {
        name: {setting: trials.open_answers(config, model, setting, out / name / setting.folder) for setting in tried}
        for name, model in models.items()
    }
    keep_programs()
    with jax.set_mesh(mesh):
        judge = _judge(config, mesh, console, show)
        entries = [_try_model(config, name, model, files[name], mesh, console) for name, model in models.items()]
        # All at once: what a judge will cost is known before its first call.
        comparisons = [comparison for entry in entries for own in entry.comparisons.values() for comparison in own]
        verdicts = iter(judge(comparisons))
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out, models)
    with (out / "comparisons.jsonl").open("w", encoding="utf-8") as file:
        runs = [_sum_up(config, entry, verdicts, judge.name, file) for entry in entries]
    betas = [run["beta"] for run in runs]
    if len(set(betas)) == len(betas) > 1:
        runs = [run | {"name": f"beta {run['beta']:g}"} for run in runs]
    prompts = len(entries[0].comparisons[tried[0]])
    record = {"judge": judge.name, "prompts": prompts, "seeds": config.seeds, "runs": runs}
    identities = {entry.name: entry.identity for entry in entries}
    write_identity(out / "sweep.json", {"options": asdict(config), "models": identities})
    (out / "sweep.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_figures(out, sweep=record)
    return record


def _remove_earlier(out: Path, models: Iterable[str]):
    """Removes what an earlier sweep has measured here, so that nothing of it stands beside what comes."""
    for name in ("sweep.json", "sweep.png", "sweep.identity.json"):
        (out / name).unlink(missing_ok=True)
    for name in models:
        shutil.rmtree(out / "alpaca_eval" / name, ignore_errors=True)


@dataclass(frozen=True)
class _Entry:
    """A model's answers before they are judged, who made them, and the rows that were not tried by reason."""

    name: str
    model: str
    beta: float
    scored: dict[Setting, list[ScoredResponse]]
    comparisons: dict[Setting, list[Comparison]]
    identity: dict[str, Any]
    unused: dict[str, list[int]]


def _try_model(
    config: SweepConfig, name: str, model: str, files: dict[Setting, AnswersFile], mesh: Mesh, console: Console
) -> _Entry:
    """Answers in every way, and scores the answers."""
    policy = load_model(model, config.compute, mesh, config.mesh)
    reference, beta = _reference(config, policy, model, mesh)
    dates = [file.data.date for file in files.values() if file.data.date]  # what was begun before is gone on with
    data = replace(config.data, date=dates[0]) if dates else config.data
    own, dataset = trials.read_trials(data, policy)
    console.print(dataset.report(policy.model, config.max_new_tokens), markup=False, highlight=False, soft_wrap=True)
    identity, texts = answers_identity(policy), prompt_texts(dataset, policy.tokenizer)
    for file in files.values():  # all of them before the first answer
        file.check(identity, texts, dataset.date)
    size, show = config.batch_size, _tracker(console)
    answers = {
        setting: trials.answer_trials(file, policy, setting.options(config), dataset, size, mesh, show)
        for setting, file in files.items()
    }
    return _Entry(
        name,
        model,
        beta,
        trials.score_trials(answers, own, policy, reference, beta=beta, batch_size=size, mesh=mesh),
        {setting: trials.compare(found, own) for setting, found in answers.items()},
        identity | {"reference": reference.identity(), "beta": beta, "data": examples_identity(dataset.examples)},
        rows_by_reason(dataset.dropped),
    )


def _sum_up(config: SweepConfig, entry: _Entry, verdicts: Iterator[Verdict], judge: str, file: TextIO) -> dict:
    """Brings a model's answers and their verdicts together, and writes them down."""
    found = {}
    for setting, comparisons in entry.comparisons.items():
        own = list(islice(verdicts, len(comparisons)))
        found[setting] = trials.outcomes(entry.scored[setting], comparisons, own, reward_of_text)
        for outcome, comparison, verdict in zip(found[setting], comparisons, own, strict=True):
            parts = {**asdict(setting), **asdict(outcome), **asdict(comparison), "verdict": asdict(verdict)}
            file.write(json.dumps({"model": entry.name, **parts}, ensure_ascii=False) + "\n")
        if config.export:
            folder = Path(config.out) / "alpaca_eval" / entry.name / setting.folder
            names = {"generator": f"{entry.name} {setting.folder}", "baseline": "preferred", "annotator": judge}
            export(folder, comparisons, own, **names)
    return sweep_run(found, name=entry.name, model=entry.model, beta=entry.beta) | {"unused_rows": entry.unused}


def _reference(config: SweepConfig, policy: LoadedModel, model: str, mesh: Mesh) -> tuple[LoadedModel, float]:
    load = partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh)
    reference = open_reference(policy, config.reference, model, load)
    return reference, find_beta(policy, config.beta, model, "--beta")


def _judge(config: SweepConfig, mesh: Mesh, console: Console, show: Track) -> Judge:
    known = config.data.eval.startswith("builtin:")
    return make_judge(
        config.judge,
        true_reward=(lambda pairs: [reward_of_text(*pair) for pair in pairs]) if known else None,
        compute=config.compute,
        mesh=mesh,
        mesh_options=config.mesh,
        console=console,
        track=show,
    )


def _named(model: list[str] | str) -> dict[str, str]:
    """Names each model by its folder; one that shares it with another gets the folder above too."""
    models = [model] if isinstance(model, str) else model
    if not models or len(set(models)) < len(models):
        raise InputError(f"--model {models}: expected one or several different runs")
    for depth in (1, 2):
        names = ["-".join(Path(source).resolve().parts[-depth:]) for source in models]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, models, strict=True))


def _tracker(console: Console) -> Track:
    return lambda items, description, total: track(
        items, description, total, console=console, disable=not console.is_terminal
    )
