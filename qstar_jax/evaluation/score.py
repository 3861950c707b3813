"""Scores every response of a file: scores.jsonl, from which pages are drawn and credit is measured."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from qstar_jax.config import DataOptions, ScoreConfig
from qstar_jax.config.paths import recorded
from qstar_jax.config.ranges import check_ranges
from qstar_jax.config.unread import check_unread
from qstar_jax.console import say
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.identity import examples_identity
from qstar_jax.data.loading import Dataset, load_examples, read_records
from qstar_jax.data.steps import parse_delimiter
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.steps import StepErrors, compute_step_errors, split_questions
from qstar_jax.evaluation.marks import mark_responses
from qstar_jax.evaluation.partial_scores import PartialScores
from qstar_jax.evaluation.scored import ScoredResponse, unscored_line
from qstar_jax.evaluation.step_marks import REWARD, judge_steps, with_steps
from qstar_jax.evaluation.steps import ALL_RIGHT, first_error
from qstar_jax.evaluation.token_rewards import score_dataset, unscored
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.files import write_atomically
from qstar_jax.store.identity import write_identity
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import IDENTICAL, are_identical, find_beta, open_reference

SCORES = "scores.jsonl"
_BESIDE = ("scores.identity.json", "heatmap.html", "credit.json", "credit.png", "steps.json", "steps.png")
KINDS = {"pairs": "preferences", "single": "completions"}  # option `answers` -> kind of records


@dataclass(frozen=True)
class ScoredFile:
    """The scored responses of a file, with what was measured on them.

    Attributes:
        config: What was asked for.
        responses: In the order of the file.
        tokenizer: The policy's.
        reference: Name of its reference.
        step_errors: How well step rewards find first errors; None where the file does not tell these.
    """

    config: ScoreConfig
    responses: list[ScoredResponse]
    tokenizer: Any
    reference: str
    dropped: Sequence[Dropped] = ()
    step_errors: StepErrors | None = None

    @property
    def out(self) -> Path:
        """The folder that holds scores.jsonl."""
        return Path(self.config.out)

    @property
    def path(self) -> Path:
        """The file of scores."""
        return self.out / SCORES

    def write(self):
        """Writes scores.jsonl: a line for each response, and for each row that has none."""
        lines = [response.to_json() for response in self.responses]
        lines += [unscored_line(row.row, row.fault or row.reason) for row in self.dropped]
        lines.sort(key=lambda line: line["row"])
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(self.path, text.encode())


def score_file(config: ScoreConfig, console: Console) -> ScoredFile:
    """Scores every response of a file and writes scores.jsonl; a run that was interrupted goes on.

    Raises:
        InputError: If the file, the model or its reference cannot be used.
    """
    _check_options(config)
    mesh, data, out = make_mesh(config.mesh), config.data, Path(config.out)
    with use_mesh(mesh, config.compute.dtype):
        load = partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh)
        policy = load(config.model)
        reference = open_reference(policy, config.reference, config.model, load)
        beta = find_beta(policy, config.beta, config.model, "--beta")
        if reference.model != policy.model:
            raise InputError(
                f"reference {reference.source} and model {config.model} have different shapes (config.json)"
            )
        if are_identical(policy, reference):
            say(console, f"warning: {IDENTICAL}")
        dataset = _load(config, policy, console)
        say(console, dataset.report(policy.model))
        _check_marks(config, dataset, policy, beta)
        settled = replace(config, data=replace(data, date=dataset.date))
        identity = {"model": policy.identity(), "reference": reference.identity(), "beta": beta}
        identity |= {"data": examples_identity(dataset.examples), "options": recorded(settled)}
        partial_scores = PartialScores(out, identity)
        if partial_scores.was_other:
            say(console, f"{partial_scores.path} is of other models, data or options: scoring begins anew")
        responses = score_dataset(
            policy,
            reference.params,
            dataset,
            beta=beta,
            batch_size=config.batch_size,
            mesh=mesh,
            alternatives=config.alternatives,
            first=config.show,
            entropies=config.wrong_step is not None,
            console=console,
            partial_scores=partial_scores,
        )
    name = str(config.reference or reference.source)
    scored = ScoredFile(config, responses, policy.tokenizer, name, dataset.dropped)
    if config.steps:
        scored = _find_steps(scored, beta)
    _remove_earlier(scored.out)
    write_identity(scored.path, identity)
    scored.write()
    partial_scores.remove()
    return scored


def _check_options(config: ScoreConfig):
    check_ranges(config)
    if config.data.eval is None:
        raise InputError("--data.eval is missing: name the file whose responses are to be scored")
    unset = ScoreConfig(model=config.model, out=config.out)
    if not config.steps:
        names = ("wrong_step", "threshold", "calibration", "data.step_delimiter")
        check_unread(config, unset, names, "without --steps")
    if config.wrong_step is None:
        check_unread(config, unset, ["calibration"], "without --wrong_step")
    if config.wrong is None:
        check_unread(config, unset, ["kind"], "without --wrong")
    if not 0 < config.calibration < 1:
        raise InputError(f"--calibration {config.calibration:g}: expected a share in (0, 1)")
    if config.threshold is not None and not math.isfinite(config.threshold):
        raise InputError(f"--threshold {config.threshold}: expected a finite number")
    parse_delimiter(config.data.step_delimiter)
    if config.wrong_step is not None and config.answers != "single":
        raise InputError("--wrong_step tells of the steps of one response; expected --answers single")


def _load(config: ScoreConfig, policy: LoadedModel, console: Console) -> Dataset:
    """Reads the responses, and says so where a file of single ones is read as pairs."""
    data, kind = config.data, KINDS[config.answers]
    vocab = {"vocabulary": policy.model.config.vocab_size, "eos_ids": eos_token_ids(policy), "console": console}
    try:
        return load_examples(data.eval, data.eval_split, kind, policy.tokenizer, data, data.max_eval_rows, **vocab)
    except InputError as error:
        if config.answers == "pairs" and _holds_single(data):
            raise InputError(f"{error}; single responses are scored with --answers single") from error
        raise


def _holds_single(data: DataOptions) -> bool:
    try:
        read_records(data.eval, data.eval_split, KINDS["single"], data, limit=1)
    except InputError:
        return False
    return True


def _check_marks(config: ScoreConfig, dataset: Dataset, policy: LoadedModel, beta: float):
    """Refuses columns that do not fit the responses; scoring would find that at its end.

    Raises:
        InputError: If marks, steps or first errors are missing, or are those of other responses.
    """
    if not (config.wrong or config.steps):
        return
    data, responses = config.data, unscored(policy, dataset, beta)
    rows, records, _ = read_records(data.eval, data.eval_split, KINDS[config.answers], data, data.max_eval_rows)
    if config.wrong:
        if config.kind != ScoreConfig.kind and not any(config.kind in rows[response.row] for response in responses):
            raise InputError(
                f"--kind {config.kind}: {data.eval} has no such column (found: {', '.join(map(repr, rows[0]))}); name "
                "the one that says of which kind a mistake is, or leave it out"
            )
        mark_responses(responses, rows, records, wrong=config.wrong, kind=config.kind, source=data.eval)
    if config.steps:
        responses = with_steps(responses, rows, data, policy.tokenizer.all_special_ids)
    if config.wrong_step is not None:
        judged = judge_steps(responses, rows, records, column=config.wrong_step, source=data.eval)
        split_questions(judged, config.calibration)


def _find_steps(scored: ScoredFile, beta: float) -> ScoredFile:
    """Finds the steps of all responses, how well their rewards find errors, and the first suspected one of each."""
    config, data = scored.config, scored.config.data
    rows, records, _ = read_records(data.eval, data.eval_split, KINDS[config.answers], data, data.max_eval_rows)
    responses = with_steps(scored.responses, rows, data, scored.tokenizer.all_special_ids)
    threshold, errors = config.threshold or 0.0, None
    if config.wrong_step is not None:
        errors = compute_step_errors(
            judge_steps(responses, rows, records, column=config.wrong_step, source=data.eval),
            model=config.model,
            reference=scored.reference,
            beta=beta,
            calibration=config.calibration,
            threshold=config.threshold,
        )
        threshold = errors.detectors[REWARD].threshold
    suspected = [replace(response, first_error=_first_error(response, threshold)) for response in responses]
    return replace(scored, responses=suspected, step_errors=errors)


def _first_error(response: ScoredResponse, threshold: float) -> int:
    suspect = first_error([step.reward for step in response.steps], threshold)
    return suspect if suspect == ALL_RIGHT else response.steps[suspect].step


def _remove_earlier(out: Path):
    """Removes the files of an earlier run, so that none of them stands beside the new ones."""
    for name in (SCORES, *_BESIDE):
        (out / name).unlink(missing_ok=True)
