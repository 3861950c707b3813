"""Beams of this library and of torch transformers' `generate`, hypothesis by hypothesis, on real prompts.

    python tests/real/beam_parity.py --model FOLDER --data FILE.jsonl.gz --out REPORT.jsonl

Runs the whole grid and appends a line of JSON for each combination and batch of prompts: how many hypotheses are equal,
how far scores lie apart, and those that differ. It goes on where an earlier report ends, and prints a summary. Float32.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, GenerationConfig

from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions
from qstar_jax.data.loading import load_examples
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import hf_compat
from qstar_jax.sharding import make_mesh
from qstar_jax.store.open import load_model

TOLERANCE = 1e-4  # nats; of sums of float32 log-probabilities, whose last digits depend on the order of additions
EarlyStopping = bool | str  # True, False, "never"
Hypothesis = tuple[list[int], float]  # tokens and score
COMBINATIONS = list(itertools.product((1, 2, 5, 10), (0.0, 1.0), (True, False, "never")))


@dataclass(frozen=True)
class Folder:
    """A model's folder, opened by both libraries."""

    path: str

    @cached_property
    def ours(self):
        loaded = load_model(
            self.path, ComputeOptions(), make_mesh(MeshOptions(data=1), jax.devices()[:1]), MeshOptions()
        )
        return loaded, jax.jit(loaded.model.unstack)(loaded.params)

    @cached_property
    def torch(self):
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        loaded, _ = self.ours
        return eos_token_ids(loaded, loaded.model.config.vocab_size)

    def prompts(self, data: str, count: int, longest: int) -> list[list[int]]:
        """The first prompts of a file, as chats; long ones lose their beginning."""
        options = DataOptions(as_chat=True, max_prompt_length=longest)
        examples = load_examples(data, "", "prompts", self.ours[0].tokenizer, options, count).examples
        return [example.prompt.tolist() for example in examples]


def beams_of_ours(
    folder: Folder,
    prompts: Sequence[Sequence[int]],
    eos_ids: tuple[int, ...],
    width: int,
    beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    max_new_tokens: int,
) -> list[list[Hypothesis]]:
    """Right-padded to `width`, so that all batches have one shape."""
    loaded, params = folder.ours
    options = hf_compat(beams, max_new_tokens, eos_ids, length_penalty=length_penalty, early_stopping=early_stopping)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    found = jax.device_get(beam_search(loaded.model, params, jnp.asarray(tokens), lengths, options))
    return [
        [(t[:n].tolist(), float(s)) for t, n, s in zip(*row, strict=True)]
        for row in zip(found.tokens, found.lengths, found.score, strict=True)
    ]


def beams_of_torch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    eos_ids: tuple[int, ...],
    beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    max_new_tokens: int,
    **more: Any,
) -> "TorchBeams":
    """Left-padded. One beam is greedy decoding there, which reports no scores and knows neither penalty nor stopping.

    Keywords are further options of `GenerationConfig`.
    """
    width, pad = max(map(len, prompts)), eos_ids[0]
    tokens = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        length_penalty=length_penalty if beams > 1 else None,
        early_stopping=early_stopping if beams > 1 else None,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids),
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=beams > 1,  # or there are no sequences_scores
        output_logits=True,
        **more,
    )
    narrowest = torch.full((len(prompts),), torch.inf)
    with torch.no_grad(), _watching(model, eos_ids, narrowest):
        found = model.generate(tokens, attention_mask=mask, generation_config=config)
    texts = [_until_eos(text, eos_ids) for text in found.sequences[:, width:].tolist()]
    logits = torch.stack(found.logits)  # [T, B * K, V]
    parents = torch.arange(len(texts))[:, None].expand(-1, len(logits)) if beams == 1 else found.beam_indices
    normaliser = torch.stack([step.double().logsumexp(-1) for step in logits])
    sums = []
    for text, path in zip(texts, parents.tolist(), strict=True):
        at = range(len(text)), path[: len(text)]
        sums.append(float((logits[(*at, text)].double() - normaliser[at]).sum()))
    exact = [total / len(text) ** length_penalty for total, text in zip(sums, texts, strict=True)]
    given = exact
    if beams > 1:
        given = found.sequences_scores.tolist()
    else:
        best, second = logits.topk(2).values.unbind(-1)
        narrowest = torch.stack([(best - second)[: len(text), row].min() for row, text in enumerate(texts)])

    def by_prompt(scores: list[float]) -> list[list[Hypothesis]]:
        flat = list(zip(texts, scores, strict=True))
        return [flat[start : start + beams] for start in range(0, len(flat), beams)]

    return TorchBeams(by_prompt(given), by_prompt(exact), narrowest.tolist())


@dataclass(frozen=True)
class TorchBeams:
    """What `generate` found.

    Attributes:
        given: K hypotheses per prompt, with its own scores.
        exact: The same with scores from its logits in float64. Torch's float32 log-softmax on CPUs is 7e-6 too high at
            49,152 tokens, always to the same side, which adds up over an answer.
        narrowest: For each prompt, the least gap at which one candidate was taken and another one was not.
    """

    given: list[list[Hypothesis]]
    exact: list[list[Hypothesis]]
    narrowest: list[float]


class _watching:
    """Keeps, for each row, the least gap at which a candidate was taken and another one was not."""

    def __init__(self, model: Any, eos_ids: tuple[int, ...], narrowest: torch.Tensor):
        self.model, self.eos_ids, self.narrowest = model, torch.tensor(eos_ids), narrowest

    def __enter__(self):
        inner = self.model._get_top_k_continuations

        def watch(*args, num_beams, cur_len, **keywords):
            found = inner(*args, num_beams=num_beams, cur_len=cur_len, **keywords)
            scores, texts, _ = found
            ends = torch.isin(texts[:, :, cur_len], self.eos_ids)
            for row, (score, end) in enumerate(zip(scores, ends, strict=True)):
                going = score[~end]
                gaps = [going[num_beams - 1] - going[num_beams]] if len(going) > num_beams else []
                gaps += [s - score[num_beams] for s in score[:num_beams][end[:num_beams]]]
                gaps += [score[num_beams - 1] - s for s in score[num_beams:][end[num_beams:]]]
                self.narrowest[row] = min([self.narrowest[row], *gaps])
            return found

        self.model._get_top_k_continuations = watch

    def __exit__(self, *_):
        del self.model._get_top_k_continuations


def _until_eos(text: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    ends = [i for i, token in enumerate(text) if token in eos_ids]
    return text[: ends[0] + 1] if ends else text


def differences(
    ours: list[list[Hypothesis]], theirs: list[list[Hypothesis]], narrowest: Sequence[float]
) -> list[dict[str, Any]]:
    """Hypotheses whose tokens differ, and whether a tie explains it.

    A tie is either two hypotheses of one rank whose scores are closer than the tolerance, or a beam that was dropped in
    favour of one that was no better than that.
    """
    found = []
    for row, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        for rank, ((text, score), (their_text, their_score)) in enumerate(zip(own, other, strict=True)):
            if text != their_text:
                gap = abs(score - their_score)
                tied = min(gap, narrowest[row]) < TOLERANCE
                part = next((i for i, (a, b) in enumerate(zip(text, their_text, strict=False)) if a != b), None)
                found.append(
                    {"row": row, "rank": rank, "scores": [score, their_score], "narrowest": narrowest[row]}
                    | {"tied": tied, "first_difference": part}
                )
    return found


def compare(
    folder: Folder,
    prompts: Sequence[Sequence[int]],
    beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    max_new_tokens: int,
    *,
    width: int | None = None,
    eos_ids: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Decodes a batch of prompts with both libraries.

    Returns:
        A report, ready for JSON: `hypotheses`, how many of them are `equal` and how many `ended` by EOS,
        `score_difference` (the largest, of equal ones) from exact scores of torch's and from those that it gives,
        `differences`, `seconds` of both.
    """
    eos_ids = eos_ids or folder.eos_ids
    options = (beams, length_penalty, early_stopping, max_new_tokens)
    start = time.perf_counter()
    ours = beams_of_ours(folder, prompts, eos_ids, width or max(map(len, prompts)), *options)
    middle = time.perf_counter()
    theirs = beams_of_torch(folder.torch, prompts, eos_ids, *options)
    end = time.perf_counter()
    different = differences(ours, theirs.exact, theirs.narrowest)
    pairs, given = (
        [pair for row in zip(ours, other, strict=True) for pair in zip(*row, strict=True)]
        for other in (theirs.exact, theirs.given)
    )
    equal = [abs(own[1] - other[1]) for own, other in pairs if own[0] == other[0]]
    as_given = [abs(own[1] - other[1]) for own, other in given if own[0] == other[0]]
    return {
        "beams": beams,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "max_new_tokens": max_new_tokens,
        "hypotheses": len(pairs),
        "equal": len(equal),
        "ended": sum(other[0][-1] in eos_ids for _, other in pairs),
        "score_difference": max(equal, default=0.0),
        "score_difference_as_given": max(as_given, default=0.0),
        "differences": different,
        "seconds": {"ours": middle - start, "torch": end - middle},
    }


def agrees(report: dict[str, Any]) -> bool:
    """Whether scores agree, and tokens too, but for ties."""
    return report["score_difference"] < TOLERANCE and all(d["tied"] for d in report["differences"])


def summary(reports: Sequence[dict[str, Any]]) -> str:
    """What there is to say about many comparisons, in one line and one more for each that disagrees."""
    several = [d for report in reports for d in report["differences"]]
    lines = [
        f"{len(reports)} comparisons, {sum(r['hypotheses'] for r in reports)} hypotheses "
        f"({sum(r['ended'] for r in reports)} ended by EOS): {sum(r['equal'] for r in reports)} equal, "
        f"{sum(d['tied'] for d in several)} differ by a tie, {sum(not d['tied'] for d in several)} without; "
        f"scores differ by {max(r['score_difference'] for r in reports):.2g} at most, and by "
        f"{max(r['score_difference_as_given'] for r in reports):.2g} with torch's log-softmax in float32"
    ]
    lines += [f"disagreement: {json.dumps(report)}" for report in reports if not agrees(report)]
    return "\n".join(lines)


def grid(
    folder: Folder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    combinations: Sequence[tuple[int, float, EarlyStopping]] = COMBINATIONS,
    batch: int = 4,
    eos_ids: tuple[int, ...] | None = None,
    skip: Sequence[tuple] = (),
) -> Iterator[dict[str, Any]]:
    """Compares all combinations on all prompts.

    One beam is greedy decoding in transformers, whatever the penalty and early stopping; ours has to be so, too.
    """
    width = max(map(len, prompts))
    for beams, length_penalty, early_stopping in combinations:
        for start in range(0, len(prompts), batch):
            if (beams, length_penalty, early_stopping, start) not in skip:
                part = prompts[start : start + batch]
                options = (beams, length_penalty, early_stopping, max_new_tokens)
                yield {"start": start} | compare(folder, part, *options, width=width, eos_ids=eos_ids)


def main(
    model: str,
    data: str,
    out: str,
    count: int = 20,
    longest: int = 96,
    batch: int = 4,
    new_tokens: int = 48,
    ends: list[str] = [],  # noqa: B006
):
    """Compares on the whole grid.

    Args:
        model: Hugging Face folder.
        data: File with prompts.
        out: Report, JSON lines; one that is there is continued.
        count: Prompts.
        longest: Longest prompt, in tokens.
        batch: Prompts at once.
        new_tokens: Longest answer.
        ends: Tokens that end answers beside the model's own, so that more of them end early.
    """
    folder = Folder(model)
    tokenizer = folder.ours[0].tokenizer
    more = tuple(tokenizer.convert_tokens_to_ids(token) for token in ends)
    assert tokenizer.unk_token_id not in more, f"{ends} has strings that are no tokens"
    path = Path(out)
    reports = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = [(r["beams"], r["length_penalty"], r["early_stopping"], r["start"]) for r in reports]
    prompts = folder.prompts(data, count, longest)
    eos_ids = tuple(sorted({*folder.eos_ids, *more}))
    with path.open("a") as file:
        for report in grid(folder, prompts, new_tokens, batch=batch, eos_ids=eos_ids, skip=done):
            reports.append(report)
            file.write(json.dumps(report) + "\n")
            file.flush()
    print(summary(reports))
    sys.exit(0 if all(map(agrees, reports)) else 1)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
