"""Runs of a pipeline of language models as texts: rows to learn from, or for people to compare."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from qstar_jax.pipeline.language import LanguageStage
from qstar_jax.pipeline.rows import pad_to_multiple
from qstar_jax.pipeline.stage import sample

Track = Callable[[Iterable, str, int], Iterable]


@dataclass(frozen=True)
class TextRun:
    """A run of a pipeline.

    Attributes:
        texts: What each stage wrote, by name.
        truncated: Stages that reached their limit, so that their end is missing.
    """

    texts: dict[str, str]
    truncated: tuple[str, ...] = ()


def draw_runs(
    stages: Sequence[LanguageStage],
    params: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    key: jax.Array,
    batch_size: int,
    track: Track = lambda items, description, total: items,
) -> list[TextRun]:
    """Runs a pipeline once for each prompt.

    Args:
        stages: The stages.
        params: Parameters of each, by name.
        prompts: The users' prompts.
        key: Random key.
        batch_size: Prompts at a time; rounded up to what the devices divide.
        track: `(batches, description, total)` wraps batches, for a progress bar.
    """
    mesh = stages[0].mesh
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-batch_size // shards) * shards
    makers, own = [stage.stage() for stage in stages], [params[stage.name] for stage in stages]
    runs: list[TextRun] = []
    for first in track(range(0, len(prompts), size), "runs of the pipeline", -(-len(prompts) // size)):
        # The last batch has the size of the others, whose programs it uses.
        part = list(prompts[first : first + size])
        outputs = sample(makers, own, jax.random.fold_in(key, first), pad_to_multiple(part, size))
        texts = [stage.read(output) for stage, output in zip(stages, outputs, strict=True)]
        cut = [np.asarray(jax.device_get(output.truncated))[:, 0] for output in outputs]
        names = [stage.name for stage in stages]
        runs += [
            TextRun(
                {name: text[i] for name, text in zip(names, texts, strict=True)},
                tuple(name for name, ends in zip(names, cut, strict=True) if ends[i]),
            )
            for i in range(len(part))
        ]
    return runs


def make_rows(
    prompts: Sequence[str],
    first: Sequence[TextRun],
    second: Sequence[TextRun],
    *,
    reward: Callable[[str, str], float | None] | None,
    label: str,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Makes rows of two runs to each prompt.

    Args:
        prompts: The users' prompts.
        first: A run for each.
        second: Another one.
        reward: (prompt, last text) -> true reward; None where nobody knows.
        label: `bradley_terry`, `best` or `none`; see `RunSamplesOptions`.
        seed: Seed of the labels.

    Returns:
        Rows as `read_pairs` reads them, with the true rewards of both runs if they are known, and reason -> number of
        pairs that are left out.
    """
    rng, rows, left_out = np.random.default_rng(seed), [], {}

    def leave_out(reason: str):
        left_out[reason] = left_out.get(reason, 0) + 1

    for prompt, *runs in zip(prompts, first, second, strict=True):
        draw = rng.random()  # for every prompt, whatever becomes of it
        texts, last = [run.texts for run in runs], list(runs[0].texts)[-1]
        rewards = None if reward is None else [reward(prompt, one[last]) for one in texts]
        if any(run.truncated for run in runs):
            leave_out("a stage reached its max_new_tokens")
        elif texts[0] == texts[1]:
            leave_out("both runs are equal")
        elif label == "best" and rewards[0] == rewards[1]:
            leave_out("both runs earn the same")
        elif label == "none":
            known = {} if rewards is None else {"rewards": rewards}
            rows.append({"prompt": prompt, "outputs": texts, "better": None, **known})
        else:
            margin = rewards[0] - rewards[1]
            better = int(margin < 0) if label == "best" else int(draw >= 1 / (1 + np.exp(-margin)))
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": texts[better],
                    "rejected": texts[1 - better],
                    "rewards": [rewards[better], rewards[1 - better]],
                }
            )
    return rows, left_out
