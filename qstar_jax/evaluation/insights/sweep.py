"""Insight 2, search: responses against the width of the beam that found them.

The paper samples for width 1 and has no greedy control; here both are measured, so that the gain of search is told
apart from the gain of less randomness.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TextIO

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import DecodeOptions, SweepConfig
from qstar_jax.config.paths import recorded
from qstar_jax.console import say
from qstar_jax.data.dropped import rows_by_reason
from qstar_jax.data.identity import examples_identity
from qstar_jax.decoding.generations_file import GenerationsFile, generation_identity, prompt_texts
from qstar_jax.errors import InputError
from qstar_jax.evaluation import trials
from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.intervals import Interval, mean_interval
from qstar_jax.evaluation.judges import Comparison, Judge, Verdict, make_judge
from qstar_jax.evaluation.judges.alpaca_eval import export
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.identity import write_identity
from qstar_jax.store.open import load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.store.sole_writer import sole_writer
from qstar_jax.store.user_cache import keep_programs
from qstar_jax.tasks import TASKS, find

PIVOT = 5  # the width at which the paper's curves are highest


@dataclass(frozen=True)
class Point:
    """The responses of one decoder, averaged over prompts.

    Attributes:
        decoder: "sampled", "greedy" or "beam".
        width: Beams.
        win_rate: Share of prompts on which the judge preferred the response to the file's; None where it never decided.
        length: Tokens, EOS included.
        logp: Sum of log pi, in nats.
        implicit_reward: Sum of beta * log(pi / pi_ref).
        true_reward: True reward; None where the task does not know it.
        truncated: Share of the responses that reached the limit.
        undecided: How many responses the judge did not decide on.
    """

    decoder: str
    width: int
    win_rate: Interval | None
    length: Interval | None
    logp: Interval | None
    implicit_reward: Interval | None
    true_reward: Interval | None
    truncated: float
    undecided: int = 0


@dataclass(frozen=True)
class SweepRun:
    """The sweep of one model.

    Attributes:
        name: Label of its curve.
        model: The model.
        beta: Temperature of its rewards: reward per nat.
        points: One for each decoder: intervals are by bootstrap over prompts, and samples of several seeds are averaged
            per prompt first.
        pivot: The width that is compared with the controls and with the widest beams.
        differences: "5 beams - greedy", say -> paired difference of win rates; None where no prompt was decided.
        unused_rows: Reason -> rows of the file that were not tried, counted from 0.
    """

    name: str
    model: str
    beta: float
    points: tuple[Point, ...]
    pivot: int
    differences: dict[str, Interval | None]
    unused_rows: dict[str, list[int]] = field(default_factory=dict)

    def describe(self) -> str:
        """The win rate of the pivot, and how it differs from that of other decoders."""
        pivot = next(point for point in self.points if (point.decoder, point.width) == ("beam", self.pivot))
        rate = "undecided" if pivot.win_rate is None else f"{pivot.win_rate:.3f}"
        controls, wider = [], ""
        for name, gain in self.differences.items():
            one, _, other = name.partition(" - ")
            if gain is None:
                continue
            if one == f"{self.pivot} beams":
                controls.append(f"{gain:+.3f} against {other}")
            else:
                wider += f"; {one} {gain:+.3f} against {self.pivot}"
        return f"{self.name}: {rate} with {self.pivot} beams, {', '.join(controls)}{wider}"


@dataclass(frozen=True)
class Sweep(Record):
    """sweep.json: models whose responses to the same prompts were judged.

    Attributes:
        judge: Name of the judge.
        prompts: How many prompts.
        seeds: Seeds of the samples.
        runs: One for each model.
    """

    NAME: ClassVar[str] = "sweep"
    COMMAND: ClassVar[str] = "qstar sweep"

    judge: str
    prompts: int
    seeds: list[int]
    runs: tuple[SweepRun, ...]

    def finding(self) -> Finding:
        """Reproduced where the pivot of the first run wins more often than each control."""
        pivot = f"{self.runs[0].pivot} beams - "
        gains = [gain for name, gain in self.runs[0].differences.items() if name.startswith(pivot) and gain is not None]
        reproduced = None
        if gains and all(gain.low > 0 for gain in gains):
            reproduced = True
        elif any(gain.high < 0 for gain in gains):
            reproduced = False
        return Finding(
            insight="search",
            title="Search",
            claim="Beam search by likelihood, which is search by reward (Eq. 13), improves a DPO policy over one beam, "
            "sampled or greedy; very wide beams gain nothing more, or lose.",
            paper="Five beams win 10 to 15 % more often against the preferred summary than one, which was sampled; "
            "beyond five, win rates fall and responses grow long (Fig. 2; no greedy control).",
            measured=f"Win rates against the preferred response ({self.judge}, {self.prompts} prompts). "
            + "".join(f"{run.describe()}. " for run in self.runs).rstrip(),
            reproduced=reproduced,
            command=self.COMMAND,
        )


@dataclass(frozen=True, order=True)
class Setting:
    """One way to decode.

    Attributes:
        width: Beams.
        decoder: "sampled", "greedy" or "beam".
        seed: Seed for sampling; 0 where nothing is drawn.
    """

    width: int
    decoder: str
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return {"sampled": f"sampled-{self.seed}", "greedy": "greedy", "beam": f"beams-{self.width}"}[self.decoder]

    @property
    def name(self) -> str:
        """Name of the decoder, whatever the seed."""
        return f"{self.width} beams" if self.decoder == "beam" else self.decoder

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
    """What was measured of one response.

    Attributes:
        row: Row of its prompt.
        win: 1 where the judge preferred it to the file's response, 0.5 for a tie, 0 where not; None if undecided.
        length: Tokens, EOS included.
        logp: Sum of log pi, in nats.
        implicit_reward: Sum of beta * log(pi / pi_ref).
        true_reward: Its true reward, where the task knows it.
        truncated: Whether it reached the limit.
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


def sweep_run(
    outcomes: Mapping[Setting, Sequence[Outcome]],
    *,
    name: str,
    model: str,
    beta: float,
    unused_rows: dict[str, list[int]] | None = None,
) -> SweepRun:
    """Summarizes the sweep of one model, whose fields `SweepRun` describes.

    For each setting there is one outcome per prompt, all in the same order of prompts.
    """
    decoders: dict[Setting, list[Sequence[Outcome]]] = {}  # samples of all seeds are one decoder
    for setting, measured in outcomes.items():
        decoders.setdefault(replace(setting, seed=0), []).append(measured)
    wins = {decoder: _by_prompt(seeds, "win") for decoder, seeds in decoders.items()}
    beams = {decoder.width: decoder for decoder in decoders if decoder.decoder == "beam"}
    widths = sorted(beams)
    pivot = PIVOT if PIVOT in widths else widths[len(widths) // 2]
    pairs = [(beams[pivot], Setting(1, "sampled")), (beams[pivot], Setting(1, "greedy"))]
    pairs += [(beams[widths[-1]], beams[pivot])] if widths[-1] > pivot else []
    return SweepRun(
        name=name,
        model=model,
        beta=beta,
        points=tuple(_point(decoder, seeds) for decoder, seeds in decoders.items()),
        pivot=pivot,
        differences={f"{one.name} - {other.name}": _interval(wins[one] - wins[other]) for one, other in pairs},
        unused_rows=unused_rows or {},
    )


def _point(decoder: Setting, seeds: Sequence[Sequence[Outcome]]) -> Point:
    return Point(
        decoder=decoder.decoder,
        width=decoder.width,
        win_rate=_interval(_by_prompt(seeds, "win")),
        **{name: _interval(_by_prompt(seeds, name)) for name in ("length", "logp", "implicit_reward", "true_reward")},
        truncated=float(_by_prompt(seeds, "truncated").mean()),
        undecided=sum(outcome.win is None for outcomes in seeds for outcome in outcomes),
    )


def _by_prompt(seeds: Sequence[Sequence[Outcome]], measure: str) -> np.ndarray:
    """Mean of a field over the seeds that have it, per prompt; NaN where none has. Shape [prompts]."""
    # None becomes NaN.
    values = np.array([[getattr(outcome, measure) for outcome in outcomes] for outcomes in seeds], float)
    measured = np.isfinite(values)
    return np.where(measured, values, 0).sum(0) / np.where(measured.any(0), measured.sum(0), np.nan)


def _interval(values: np.ndarray) -> Interval | None:
    return mean_interval(values) if np.isfinite(values).any() else None


def measure_sweep(config: SweepConfig, console: Console) -> Sweep:
    """Decodes with every width, judges the responses, and writes comparisons.jsonl and sweep.json.

    Raises:
        InputError: If something that is named cannot be used.
    """
    # What options and existing files say is checked before any model is loaded.
    decoders, models = settings(config), _names(config.model)
    if config.data.eval is None:
        raise InputError("--data.eval is missing: name a file with prompts and the responses to compare with")
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
    """Names each model by its folder, or by two levels of folders where one level is ambiguous."""
    models = [model] if isinstance(model, str) else model
    if not models or len(set(models)) < len(models):
        raise InputError(f"--model {models}: expected one or several different runs")
    for depth in (1, 2):
        names = ["-".join(Path(source).resolve().parts[-depth:]) for source in models]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, models, strict=True))


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
