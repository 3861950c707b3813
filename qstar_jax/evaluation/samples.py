"""Samples to make pairs of, from scores.jsonl or from rows of a file."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from qstar_jax.config import PairsConfig
from qstar_jax.config.ranges import check_ranges
from qstar_jax.config.unread import check_unread
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.outcomes import parse_label, parse_reward, whole_number
from qstar_jax.data.reading import read_rows
from qstar_jax.data.steps import StepDelimiter, delimited_ends, listed_ends, parse_delimiter
from qstar_jax.errors import InputError
from qstar_jax.evaluation.pairs import Sample
from qstar_jax.evaluation.scored import SCORE_LINE, ScoredResponse
from qstar_jax.untrusted import read_json_lines

SCORES = "scores.jsonl"


def read_samples(config: PairsConfig) -> tuple[list[Sample], Counter[str]]:
    """Reads samples, with their steps if pairs of steps are asked for.

    Returns:
        The samples, and reason -> number of those that cannot be used.

    Raises:
        InputError: If the file cannot be read, has no steps, rewards or labels where they are needed, or an option has
            no effect on it.
    """
    place = Path(config.samples).expanduser()
    scores = place / SCORES if (place / SCORES).is_file() else place
    is_scored = scores.name == SCORES and scores.is_file()
    _check_options(config, is_scored)
    samples, dropped = _scored(scores, config) if is_scored else _rows(config)
    if not samples:
        reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise InputError(f"{config.samples}: no sample can be used ({reasons})")
    return samples, dropped


def _check_options(config: PairsConfig, is_scored: bool):
    check_ranges(config)

    def refuse(why: str, *names: str):
        check_unread(config, PairsConfig(config.samples, config.out), names, f"{why}; leave it out")

    if is_scored:
        refuse("on scores.jsonl, whose samples earn their total reward", "reward", "label")
        refuse("on scores.jsonl, which is no file of rows", "split", "prompt", "completion")
        refuse("on scores.jsonl, which has the steps and their rewards", "wrong_step", "step_delimiter")
    else:
        refuse("on rows: it judges rewards of steps, in scores.jsonl", "threshold")
    if not config.steps:
        refuse("without --steps", "threshold", "wrong_step", "step_delimiter")
    elif not is_scored:
        refuse("with --steps, whose pairs follow --wrong_step", "reward", "label")
    if config.reward is not None:
        refuse(f"beside --reward {config.reward}, by which samples are ranked", "label")
    if not is_scored and (config.steps or config.reward is None):
        refuse("on samples that have no rewards to differ by", "margin")
    if config.steps and not is_scored and config.wrong_step is None:
        raise InputError(
            f"--steps: {config.samples} is no scores.jsonl, so it must say which steps are wrong; name the column with "
            "--wrong_step, or score the file first (qstar score --steps)"
        )


def _scored(path: Path, config: PairsConfig) -> tuple[list[Sample], Counter[str]]:
    def parse(record: dict) -> Sample | str:
        if record["reason"] is not None:
            return "not scored"
        response = ScoredResponse.from_json(record)
        return _unusable(response) or _scored_sample(response, config.steps)

    samples, dropped = [], Counter()
    for found in read_json_lines(path, parse, SCORE_LINE):
        if isinstance(found, str):
            dropped[found] += 1
        else:
            samples.append(found)
    return samples, dropped


def _unusable(response: ScoredResponse) -> str | None:
    if response.truncated:
        return "truncated, so that its end is missing"
    if response.prompt_truncated:
        return "without the beginning of its prompt"
    if not all(response.action_mask):
        return "a dialogue, with words of others between its actions"
    return None


def _scored_sample(response: ScoredResponse, in_steps: bool) -> Sample:
    # The last token is EOS, which training adds itself.
    pieces, row, prompt, total = response.pieces[:-1], response.row, response.prompt, response.total_reward
    if not in_steps:
        return Sample(row, prompt, ("".join(pieces),), total=total)
    if not response.step:
        raise InputError("it has no steps; score the file with --steps")
    of_token = response.step[:-1]
    texts = [
        "".join(piece for piece, step in zip(pieces, of_token, strict=True) if step == part.step)
        for part in response.steps
    ]
    return Sample(row, prompt, tuple(texts), tuple(part.reward for part in response.steps), total=total)


def _rows(config: PairsConfig) -> tuple[list[Sample], Counter[str]]:
    samples, dropped = [], Counter()
    delimiter = parse_delimiter(config.step_delimiter, "--step_delimiter") if config.steps else None
    for index, row in enumerate(read_rows(config.samples, config.split)):
        if isinstance(row, BadRow):
            dropped[f"not readable ({row.reason})"] += 1
            continue
        where = f"{config.samples} row {index + 1}"
        prompt, text = (_text(row, getattr(config, name), where, f"--{name}") for name in ("prompt", "completion"))
        if config.steps:
            steps = _steps(row, text, delimiter, where)
            first = _first_wrong(row, config.wrong_step, len(steps), where)
            samples.append(Sample(index, prompt, steps, first_wrong=first))
        else:
            samples.append(Sample(index, prompt, (text,), total=_total(row, config, where)))
    return samples, dropped


def _value(row: dict, column: str, where: str, option: str) -> Any:
    if column not in row:
        raise InputError(
            f"{where}: no column {column!r} (found: {', '.join(map(repr, row))}); name yours with {option}"
        )
    return row[column]


def _text(row: dict, column: str, where: str, option: str) -> str:
    if isinstance(value := _value(row, column, where, option), str):
        return value
    raise InputError(f"{where}, column {column!r}: found {type(value).__name__}; expected a text")


def _steps(row: dict, text: str, delimiter: StepDelimiter, where: str) -> tuple[str, ...]:
    if delimiter.pattern is None:
        ends = listed_ends(
            text, _value(row, delimiter.column, where, "--step_delimiter"), f"{where}, column {delimiter.column!r}"
        )
    else:
        ends = delimited_ends(text, delimiter.pattern)
    return tuple(text[begin:end] for begin, end in pairwise([0, *ends]))


def _first_wrong(row: dict, column: str, count: int, where: str) -> int:
    value = _value(row, column, where, "--wrong_step")
    if (first := whole_number(value)) is not None and -1 <= first < count:
        return first
    raise InputError(
        f"{where}, column {column!r}: found {value!r}; expected the number of the first wrong of {count} steps, from "
        "0, or -1 if all are right (does --step_delimiter find the same steps?)"
    )


def _total(row: dict, config: PairsConfig, where: str) -> float:
    fix = "--label, or a column of rewards with --reward" if config.reward is None else "--reward"
    column, parse = (config.label, parse_label) if config.reward is None else (config.reward, parse_reward)
    _value(row, column, where, fix)
    try:
        return float(parse(row, column))
    except BadRow as error:
        raise InputError(f"{where}: {error.fault}; name yours with {fix}") from error
