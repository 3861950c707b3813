"""Responses sampled from the reference, and the file that keeps them with a run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.data.tokenization import Example, Response
from qstar_jax.decoding import SampleOptions, sample
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.store.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Samples:
    """Responses sampled from the reference.

    Attributes:
        examples: A prompt with one response each.
        ref_logps: log pi_ref of each response's tokens in nats. Shape [T] each.
    """

    examples: list[Example]
    ref_logps: list[np.ndarray]

    @property
    def mean_length(self) -> float:
        """Mean tokens per response."""
        return float(np.mean([len(logps) for logps in self.ref_logps]))


def draw(
    model: CausalLM,
    params: Params,
    prompts: Sequence[np.ndarray],
    mesh: Mesh,
    *,
    seed: int,
    rows: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: float = 1.0,
) -> list[Response]:
    """Samples one response per prompt from the whole vocabulary.

    Args:
        model: The model.
        params: Its parameters; in a job of several processes all must call this together.
        prompts: Token ids of each prompt, at least one each.
        mesh: Devices of the model.
        seed: Seed for sampling.
        rows: Prompts decoded at once.
        max_new_tokens: Longest response in tokens, EOS included.
        eos_ids: Tokens that end a response.
        temperature: Divides log pi before a token is drawn; 0 takes the most likely token.

    Returns:
        The responses; one that reached `max_new_tokens` without EOS is truncated.
    """
    # One shape for all batches.
    width = -(-max(len(prompt) for prompt in prompts) // 64) * 64
    replicated = NamedSharding(mesh, PartitionSpec())
    options = SampleOptions(max_new_tokens, eos_ids, temperature=temperature)
    responses: list[Response] = []
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        padded, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for b, prompt in enumerate(batch):
            padded[b, : len(prompt)], lengths[b] = prompt, len(prompt)
        padded, lengths = (
            jax.make_array_from_callback(x.shape, replicated, lambda index, x=x: x[index]) for x in (padded, lengths)
        )
        # A key per prompt: samples do not depend on how many are decoded at once.
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(start + np.arange(rows))
        samples = sample(model, params, padded, lengths, keys, options)
        tokens, ends, finished = multihost_utils.process_allgather(
            (samples.tokens, samples.lengths, samples.finished), tiled=True
        )
        responses += [Response(tokens[b, 0, : ends[b, 0]], not finished[b, 0]) for b in range(len(batch))]
    return responses


def write_samples(path: Path, samples: Samples, tokenizer: "PreTrainedTokenizerBase"):
    """Writes one line of JSON per sample, with its text for readers; atomically."""
    lines = [
        {
            "row": example.row,
            "text": tokenizer.decode(
                example.responses[0].ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            "truncated": example.responses[0].truncated,
            "prompt_truncated": example.prompt_truncated,
            "prompt": example.prompt.tolist(),
            "answer": example.responses[0].ids.tolist(),
            "ref_logp": logps.tolist(),
        }
        for example, logps in zip(samples.examples, samples.ref_logps, strict=True)
    ]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_samples(path: Path) -> Samples:
    """Reads what `write_samples` wrote.

    Raises:
        InputError: If the file is damaged.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        examples = [
            Example(
                np.array(line["prompt"], np.int32),
                bool(line["prompt_truncated"]),
                (Response(np.array(line["answer"], np.int32), bool(line["truncated"])),),
                int(line["row"]),
            )
            for line in lines
        ]
        samples = Samples(examples, [np.array(line["ref_logp"], np.float32) for line in lines])
        shapes = [(e.responses[0].ids.shape, logps.shape) for e, logps in zip(examples, samples.ref_logps, strict=True)]
        complete = len(lines) > 1 and all(ids == logps and ids > (0,) for ids, logps in shapes)
        if not complete or not all(np.isfinite(logps).all() for logps in samples.ref_logps):
            raise ValueError("expected two responses or more, with a finite number for each of their tokens")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path}: not the reference's samples with which the run began ({error!r}); restore that file, or delete "
            "it to continue without"
        ) from error
    return samples
