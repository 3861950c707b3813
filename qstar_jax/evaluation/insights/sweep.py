"""Insight 2, search: what answers are worth against the width of the beam that found them.

The paper samples for width 1 and has no greedy control; here both are measured, so that what search gains is told
apart from what less randomness gains.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import DecodeOptions, SweepConfig
from qstar_jax.console import say, track
from qstar_jax.data.dropped import rows_by_reason
from qstar_jax.decoding.generations_file import GenerationsFile, generation_identity, prompt_texts
from qstar_jax.errors import InputError
from qstar_jax.evaluation import trials
from qstar_jax.evaluation.intervals import mean_interval
from qstar_jax.evaluation.judges import Comparison, Judge, Verdict, make_judge
from qstar_jax.evaluation.judges.alpaca_eval import export
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.sharding import make_mesh
from qstar_jax.store.files import write_json
from qstar_jax.store.identity import examples_identity, write_identity
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.tasks import TASKS, find

PIVOT = 5  # the width at which the paper's curves are highest


@dataclass(frozen=True, order=True)
class Setting:
    """One way to decode.

    Attributes:
        width: Beams.
        decoder: "sampled", "greedy" or "beam".
        seed: Of the samples; 0 where nothing is drawn.
    """

    width: int
    decoder: str
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return {"sampled": f"sampled-{self.seed}", "greedy": "greedy", "beam": f"beams-{self.width}"}[self.decoder]

    def options(self, config: SweepConfig) -> DecodeOptions:
        """Returns its `decode:` block."""
        common = {"max_new_tokens": config.max_new_tokens, "stop": config.stop}
        match self.decoder:
            case "sampled":
                drawn = {"temperature": config.temperature, "top_k": config.top_k, "seed": self.seed}
                return DecodeOptions(method="sample", **drawn, **common)
            case "beam":
                return DecodeOptions(method="beam", beams=self.width, **common)
        return DecodeOptions(**common)


@dataclass(frozen=True)
class Outcome:
    """What an answer was worth.

    Attributes:
        row: Row of its prompt.
        win: 1 where the judge preferred it to the file's answer, 0.5 for a tie, 0 where not; None if undecided.
        length: Its tokens, EOS included.
        logp: Sum of log pi, in nats.
        implicit_reward: Sum of beta * log(pi / pi_ref).
        true_reward: Its true reward, where the task knows it.
        truncated: Whether it ran into the limit.
    """

    row: int
    win: float | None
    length: int
    logp: float
    implicit_reward: float
    true_reward: float | None
    truncated: bool


def settings(config: SweepConfig) -> list[Setting]:
    """Lists the ways to decode that a sweep compares.

    Args:
        config: The sweep.

    Returns:
        Samples of each seed, greedy, and each width.

    Raises:
        InputError: If widths or seeds are missing, repeated or out of range.
    """
    for name, values, least in (("widths", config.widths, 2), ("seeds", config.seeds, 0)):
        if not values or len(set(values)) < len(values) or min(values) < least:
            raise InputError(
                f"--{name} {values}: expected one or more different numbers of at least {least}"
                + ("; width 1 is always tried" if name == "widths" else "")
            )
    sampled = [Setting(1, "sampled", seed) for seed in config.seeds]
    return [*sampled, Setting(1, "greedy"), *(Setting(width, "beam") for width in sorted(config.widths))]


def sweep_run(outcomes: dict[Setting, Sequence[Outcome]], *, name: str, model: str, beta: float) -> dict:
    """Sums up the sweep of one model.

    Args:
        outcomes: For each setting one outcome a prompt, all in the same order of prompts.
        name: Label of its curve.
        model: The model.
        beta: Temperature of its rewards.

    Returns:
        One entry of "runs" in sweep.json: means with intervals (bootstrap over prompts; samples of several seeds are
        averaged for each prompt first), and paired differences of win rates.
    """
    groups: dict[tuple[str, int], list[Setting]] = {}
    for setting in outcomes:
        groups.setdefault((setting.decoder, setting.width), []).append(setting)

    def by_prompt(key: tuple[str, int], of: Callable[[Outcome], float | None]) -> np.ndarray:
        values = [[of(outcome) for outcome in outcomes[setting]] for setting in groups[key]]
        filled = np.array(values, float)  # None becomes NaN
        there = np.isfinite(filled)
        return np.where(there, filled, 0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)

    def interval(values: np.ndarray) -> dict[str, float] | None:
        return asdict(mean_interval(values)) if np.isfinite(values).any() else None

    def point(key: tuple[str, int]) -> dict:
        figures = {
            "win_rate": lambda outcome: outcome.win,
            "length": lambda outcome: outcome.length,
            "logp": lambda outcome: outcome.logp,
            "implicit_reward": lambda outcome: outcome.implicit_reward,
            "true_reward": lambda outcome: outcome.true_reward,
        }
        return {
            "decoder": key[0],
            "width": key[1],
            **{figure: interval(by_prompt(key, of)) for figure, of in figures.items()},
            "truncated": float(by_prompt(key, lambda outcome: outcome.truncated).mean()),
            "undecided": sum(outcome.win is None for setting in groups[key] for outcome in outcomes[setting]),
        }

    wins = {key: by_prompt(key, lambda outcome: outcome.win) for key in groups}
    widths = sorted(width for decoder, width in groups if decoder == "beam")
    pivot = PIVOT if PIVOT in widths else widths[len(widths) // 2]
    pairs = [(("beam", pivot), ("sampled", 1)), (("beam", pivot), ("greedy", 1))]
    pairs += [(("beam", widths[-1]), ("beam", pivot))] if widths[-1] > pivot else []
    return {
        "name": name,
        "model": model,
        "beta": beta,
        "points": [point(key) for key in groups],
        "pivot": pivot,
        "differences": {f"{_said(one)} - {_said(other)}": interval(wins[one] - wins[other]) for one, other in pairs},
    }


def _said(key: tuple[str, int]) -> str:
    decoder, width = key
    return f"{width} beams" if decoder == "beam" else decoder


def measure_sweep(config: SweepConfig, console: Console) -> dict:
    """Decodes with every width, judges the answers, and writes comparisons.jsonl and sweep.json.

    Args:
        config: The sweep.
        console: Where to show progress.

    Returns:
        What sweep.json holds.

    Raises:
        InputError: If something that is named cannot be used.
    """
    tried, models = settings(config), _named(config.model)
    if config.data.eval is None:
        raise InputError("--data.eval is missing: name a file with prompts and the answers to compare with")
    out, mesh = Path(config.out), make_mesh(config.mesh)
    files = {
        name: {
            setting: trials.open_generations(config, model, setting.options(config), out / name / setting.folder)
            for setting in tried
        }
        for name, model in models.items()
    }
    keep_programs()
    with jax.set_mesh(mesh):
        judge = _judge(config, mesh, console)
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
    write_json(out / "sweep.json", record)
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
    config: SweepConfig, name: str, model: str, files: dict[Setting, GenerationsFile], mesh: Mesh, console: Console
) -> _Entry:
    """Answers in every way, and scores the answers."""
    policy = load_model(model, config.compute, mesh, config.mesh)
    reference, beta = _reference(config, policy, model, mesh)
    dates = [file.date for file in files.values() if file.date]  # what was begun before is gone on with
    data = replace(config.data, date=dates[0]) if dates else config.data
    own, dataset = trials.read_trials(data, policy)
    say(console, dataset.report(policy.model, config.max_new_tokens))
    identity, texts = generation_identity(policy), prompt_texts(dataset, policy.tokenizer)
    for file in files.values():  # all of them before the first answer
        file.check(identity, texts, dataset.date)
    size, show = config.batch_size, partial(track, console)
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
        found[setting] = _outcomes(entry.scored[setting], comparisons, own)
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


def _judge(config: SweepConfig, mesh: Mesh, console: Console) -> Judge:
    built_in = find(config.data.eval)
    return make_judge(
        config.judge,
        true_reward=(lambda pairs: [built_in[0].true_reward(*pair) for pair in pairs]) if built_in else None,
        compute=config.compute,
        mesh=mesh,
        mesh_options=config.mesh,
        console=console,
        track=partial(track, console),
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


def _outcomes(
    scored: Sequence[ScoredResponse],
    comparisons: Sequence[Comparison],
    verdicts: Sequence[Verdict],
) -> list[Outcome]:
    """Brings together what is known of each answer."""
    return [
        Outcome(
            row=record.row,
            win=verdict.win,
            length=len(record.token_ids),
            logp=float(sum(record.logp)),
            implicit_reward=record.total_reward,
            true_reward=_true_reward(comparison.prompt, comparison.answer),
            truncated=record.truncated,
        )
        for record, comparison, verdict in zip(scored, comparisons, verdicts, strict=True)
    ]


def _true_reward(prompt: str, response: str) -> float | None:
    """The true reward by the first task whose prompt this is, from whatever file it was read; None without one."""
    rewards = (task.true_reward(prompt, response) for task in TASKS)
    return next((reward for reward in rewards if reward is not None), None)
