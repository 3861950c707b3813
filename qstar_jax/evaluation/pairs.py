"""Preference pairs from several samples of each prompt, of whole responses or of single steps (Step-DPO).

References:
    Lai et al., "Step-DPO: step-wise preference optimization for long-chain reasoning of LLMs", arXiv 2406.18629.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A response to a prompt, in steps, and what is known of it.

    Attributes:
        row: Row of its file, from 0.
        prompt: Text before the response.
        steps: Texts of its steps; joined they spell the response.
        rewards: Reward of each step; None if they are not known.
        first_wrong: Its first wrong step, -1 if all are right; None if it is not known.
        total: What the whole response earned; None if it is not known.
    """

    row: int
    prompt: str
    steps: tuple[str, ...]
    rewards: tuple[float, ...] | None = None
    first_wrong: int | None = None
    total: float | None = None


@dataclass(frozen=True)
class Pairs:
    """Pairs, and what became of the samples.

    Attributes:
        rows: Rows of pairs.jsonl.
        unused: Reason -> number of samples (of prompts, for whole responses) without a pair of their own.
    """

    rows: list[Row]
    unused: Counter[str]


# (a sample, number of a step, the samples with the same steps before it) -> whether its step is wrong there.
IsWrong = Callable[[Sample, int, Sequence[Sample]], bool]


def marked_wrong(sample: Sample, step: int, siblings: Sequence[Sample]) -> bool:
    """By what is known: steps before the first wrong one are right; those after it are not judged."""
    return sample.first_wrong == step


def below(threshold: float) -> IsWrong:
    """By an absolute reward."""
    return lambda sample, step, siblings: sample.rewards[step] < threshold


def worst(sample: Sample, step: int, siblings: Sequence[Sample]) -> bool:
    """By comparison: other samples took at least one other step there, and each of them earned more."""
    others = [other for other in siblings if other.steps[step] != sample.steps[step]]
    return bool(others) and all(other.rewards[step] > sample.rewards[step] for other in others)


def step_pairs(samples: Iterable[Sample], is_wrong: IsWrong, *, margin: float = 0.0) -> Pairs:
    """Pairs the first wrong step of each sample with a right step of another one.

    The chosen step comes from a sample of the same prompt that has taken the same steps before, and whose step there
    is another one and right; of several, the one with the highest reward, otherwise that of the longest stretch of
    right steps, otherwise the first. Samples that fail in the same way share one pair.

    Args:
        samples: Samples of any prompts.
        is_wrong: How a step is judged.
        margin: Smallest difference of the steps' rewards, where they are known.

    Returns:
        Pairs in the order of the samples; the steps before them belong to the prompt.
    """
    rows, unused, seen = [], Counter(), set()
    for group in _by_prompt(samples):
        for sample in group:
            wrong, siblings = _first_wrong(sample, group, is_wrong)
            if wrong is None:
                unused["no step is wrong"] += 1
                continue
            others = [other for other in siblings if other.steps[wrong] != sample.steps[wrong]]
            right = [other for other in others if not _is_wrong_at(other, wrong, siblings, is_wrong)]
            if not right:
                unused[f"no other sample took {'a right' if others else 'another'} step there"] += 1
                continue
            chosen = max(right, key=lambda other: _preference(other, wrong))
            if sample.rewards is not None and chosen.rewards[wrong] - sample.rewards[wrong] < margin:
                unused["the rewards of the two steps are closer than the margin"] += 1
                continue
            before = "".join(sample.steps[:wrong])
            name = (sample.prompt, before, sample.steps[wrong])
            if name in seen:
                unused["another sample has failed in the same way"] += 1
                continue
            seen.add(name)
            rows.append(_step_row(sample, chosen, wrong, before))
    return Pairs(rows, unused)


def response_pairs(samples: Iterable[Sample], *, margin: float = 0.0) -> Pairs:
    """Pairs the best sample of each prompt with the worst.

    Args:
        samples: Samples of any prompts, whose totals are known.
        margin: Smallest difference of their totals.

    Returns:
        A pair for each prompt whose best and worst sample differ.
    """
    rows, unused = [], Counter()
    for group in _by_prompt(samples):
        best, least = max(group, key=lambda sample: sample.total), min(group, key=lambda sample: sample.total)
        if len(group) == 1:
            unused["prompts with one sample"] += 1
        elif best.total == least.total:
            unused["prompts all of whose samples are equally good"] += 1
        elif best.total - least.total < margin:
            unused["prompts whose best and worst sample are closer than the margin"] += 1
        elif best.steps == least.steps:
            unused["prompts whose best and worst sample are the same text"] += 1
        else:
            texts = {"chosen": "".join(best.steps), "rejected": "".join(least.steps)}
            margins = {"margin": best.total - least.total, "rows": [best.row, least.row]}
            rows.append({"prompt": best.prompt} | texts | margins)
    return Pairs(rows, unused)


def _by_prompt(samples: Iterable[Sample]) -> list[list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample)
    return list(groups.values())


def _siblings(sample: Sample, step: int, group: Sequence[Sample]) -> list[Sample]:
    """Samples that took the same steps before `step`, and one more."""
    return [other for other in group if len(other.steps) > step and other.steps[:step] == sample.steps[:step]]


def _first_wrong(sample: Sample, group: Sequence[Sample], is_wrong: IsWrong) -> tuple[int | None, list[Sample]]:
    for step in range(len(sample.steps)):
        siblings = _siblings(sample, step, group)
        if is_wrong(sample, step, siblings):
            return step, siblings
    return None, []


def _is_wrong_at(other: Sample, step: int, siblings: Sequence[Sample], is_wrong: IsWrong) -> bool:
    """Whether a sibling's step cannot be chosen; where errors are marked, what follows one is not right either."""
    if other.first_wrong is not None:
        return 0 <= other.first_wrong <= step
    return is_wrong(other, step, siblings)


def _preference(other: Sample, step: int) -> float:
    if other.rewards is not None:
        return other.rewards[step]
    return float("inf") if other.first_wrong == -1 else other.first_wrong


def _step_row(sample: Sample, chosen: Sample, step: int, before: str) -> Row:
    row = {
        "prompt": sample.prompt + before,
        # Says that the texts are steps, so that they get no EOS; those before them are part of the prompt.
        "initial_reason_steps": "",
        "chosen": chosen.steps[step],
        "rejected": sample.steps[step],
        "step": step,
        "rows": [chosen.row, sample.row],
    }
    return row if sample.rewards is None else row | {"margin": chosen.rewards[step] - sample.rewards[step]}
