"""Prompts as text in, answers as text out."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import DecodeOptions
from qstar_jax.decoding.beam import beam_search
from qstar_jax.decoding.hypotheses import Hypotheses
from qstar_jax.decoding.sampling import sample
from qstar_jax.errors import InputError
from qstar_jax.loading import LoadedModel


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: Its text, without special tokens.
        tokens: Its token ids, EOS included.
        logp: Sum of log pi over these tokens, in nats.
        finished: Whether it ends in EOS.
    """

    text: str
    tokens: tuple[int, ...]
    logp: float
    finished: bool


def check_options(options: DecodeOptions):
    """Refuses options that do not go together, so that none is silently ignored.

    Raises:
        InputError: If one of them would have no effect, or has no meaning.
    """
    wrong = None
    if options.beams < 1 or options.max_new_tokens < 1 or options.return_sequences < 1:
        wrong = "beams, max_new_tokens and return_sequences are at least 1"
    elif not 0 <= options.temperature < float("inf") or options.top_k < 0 or not 0 < options.top_p <= 1:
        wrong = "temperature and top_k are numbers of at least 0, top_p is above 0 and at most 1"
    elif options.beams > 1 and options.temperature > 0:
        wrong = f"beams {options.beams} search, temperature {options.temperature} samples; set beams 1 or temperature 0"
    elif options.temperature == 0 and (options.top_k > 0 or options.top_p < 1):
        wrong = (
            "top_k and top_p restrict sampling, and temperature 0 does not sample; set a temperature, for instance 1"
        )
    elif options.temperature == 0 and options.return_sequences > options.beams:
        wrong = (
            f"return_sequences {options.return_sequences} asks for more answers than beams {options.beams} find; "
            "set more beams, or a temperature to sample"
        )
    if wrong:
        raise InputError(f"decode: {wrong}")


def generate(
    loaded: LoadedModel, prompts: list[np.ndarray], options: DecodeOptions, mesh: Mesh, *, seed_offset: int = 0
) -> list[list[Answer]]:
    """Decodes one batch of prompts.

    Args:
        loaded: Model, parameters and tokenizer.
        prompts: Token ids of each prompt, at least one each. The first call with a number of prompts, or with longer
            ones (in steps of 64 tokens), compiles.
        options: How to decode.
        mesh: Devices of the model.
        seed_offset: Number of the batch, folded into the key, so that batches draw different samples.

    Returns:
        `options.return_sequences` answers a prompt, the best first where there is a search.

    Raises:
        InputError: If the options do not go together.
    """
    check_options(options)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-int(lengths.max()) // 64) * 64
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    # Replicated: rows are few, and beams of one prompt belong together.
    padded, lengths = jax.device_put((padded, lengths), NamedSharding(mesh, PartitionSpec()))
    common = {"max_new_tokens": options.max_new_tokens, "eos_ids": (loaded.tokenizer.eos_token_id,)}
    if options.beams > 1:
        found = beam_search(loaded.model, loaded.params, padded, lengths, beams=options.beams, **common)
    else:
        found = sample(
            loaded.model,
            loaded.params,
            padded,
            lengths,
            jax.random.fold_in(jax.random.key(options.seed), seed_offset),
            num_samples=options.return_sequences,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            **common,
        )
    return _answers(jax.device_get(found), loaded, options.return_sequences)


def _answers(found: Hypotheses, loaded: LoadedModel, count: int) -> list[list[Answer]]:
    def answer(row: int, rank: int) -> Answer:
        tokens = found.tokens[row, rank, : found.lengths[row, rank]].tolist()
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, tuple(tokens), float(found.logp[row, rank]), bool(found.finished[row, rank]))

    rows, width = found.logp.shape
    ranks = [[rank for rank in range(min(count, width)) if np.isfinite(found.logp[row, rank])] for row in range(rows)]
    return [[answer(row, rank) for rank in ranks[row]] for row in range(rows)]
