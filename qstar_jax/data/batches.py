"""Examples -> arrays of one shape, and which examples make the batch of a step.

The batch is a pure function of (seed, step): a resumed run, on any number of hosts, sees the same rows in order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.data.tokenization import Example


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B prompts with R answers each (2: chosen, rejected; 1: fine-tuning). Masks come from lengths, not from token ids.

    Args:
        tokens: Prompt then answer, right-padded.
        prompt_lengths: Tokens of each prompt.
        targets: The answers alone, right-padded; EOS included.
        response_lengths: Tokens of each answer.
        truncated: The answer lost its end, and its EOS.
        weights: 1, or 0 for rows that only fill up the last batch of an evaluation.
        ref_logp: log pi_ref of `targets` in nats, where it is cached.
    """

    tokens: Int[Array, "B R S"]
    prompt_lengths: Int[Array, " B"]
    targets: Int[Array, "B R T"]
    response_lengths: Int[Array, "B R"]
    truncated: Bool[Array, "B R"]
    weights: Float[Array, " B"]
    ref_logp: Float[Array, "B R T"] | None = None

    @property
    def response_mask(self) -> Bool[Array, "B R T"]:
        """True at the tokens of `targets` that are the answer's."""
        return self.response_lengths[..., None] > np.arange(self.targets.shape[-1])


def padded_lengths(examples: Sequence[Example], multiple: int = 32) -> tuple[int, int]:
    """Lengths into which every example fits, so that one compiled shape serves all batches.

    Args:
        examples: At least one example, with at least one answer each.
        multiple: Both lengths are multiples of it, in tokens.

    Returns:
        Length S of prompt and answer together, and T of the answers alone (at most S), in tokens.
    """
    longest = max(len(e.prompt) + len(r.ids) for e in examples for r in e.responses)
    longest_response = max(len(r.ids) for e in examples for r in e.responses)
    return -(-longest // multiple) * multiple, -(-longest_response // multiple) * multiple


def make_batch(
    examples: Sequence[Example], *, length: int, response_length: int, pad_id: int, fill_to: int | None = None
) -> Batch:
    """Pads examples to one shape.

    Args:
        examples: At least one; all with the same number of answers.
        length: S, room for prompt and answer, in tokens.
        response_length: T, room for an answer, in tokens.
        pad_id: Any token id; what it is has no effect, as lengths mark the padding.
        fill_to: Repeat the first example with weight 0 up to so many rows.

    Returns:
        A batch of numpy arrays: int32, bool for `truncated`, float32 for `weights`.

    Raises:
        ValueError: An example does not fit, or has another number of answers than the first.
    """
    rows = [*examples, *[examples[0]] * ((fill_to or 0) - len(examples))]
    answers = len(examples[0].responses)
    tokens = np.full((len(rows), answers, length), pad_id, np.int32)
    targets = np.full((len(rows), answers, response_length), pad_id, np.int32)
    for b, example in enumerate(rows):
        for r, (_, response) in enumerate(zip(range(answers), example.responses, strict=True)):
            _check_fits(example, len(response.ids), length, response_length)
            start, stop = len(example.prompt), len(example.prompt) + len(response.ids)
            tokens[b, r, :start], tokens[b, r, start:stop] = example.prompt, response.ids
            targets[b, r, : len(response.ids)] = response.ids
    return Batch(
        tokens=tokens,
        prompt_lengths=np.array([len(e.prompt) for e in rows], np.int32),
        targets=targets,
        response_lengths=np.array([[len(r.ids) for r in e.responses] for e in rows], np.int32),
        truncated=np.array([[r.truncated for r in e.responses] for e in rows], bool),
        weights=(np.arange(len(rows)) < len(examples)).astype(np.float32),
    )


def _check_fits(example: Example, answer: int, length: int, response_length: int) -> None:
    if len(example.prompt) + answer > length or answer > response_length:
        raise ValueError(
            f"row {example.row + 1}: a prompt of {len(example.prompt)} and an answer of {answer} tokens do not fit "
            f"into length {length} and response_length {response_length}; take them from padded_lengths"
        )


def step_indices(seed: int, step: int, num_examples: int, batch_size: int) -> np.ndarray:
    """The examples of a step: shuffled anew each epoch; batches run on across epochs, so no row is ever left out.

    Args:
        seed: Fixes the order; at least 0.
        step: Counted from 0.
        num_examples: Examples in the data, at least 1.
        batch_size: Examples a step, over all hosts; may exceed `num_examples`.

    Returns:
        Indices of examples, int64 [batch_size].
    """
    positions = np.arange(batch_size, dtype=np.int64) + step * batch_size
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _epoch_order(seed, int(epoch), num_examples)[offsets[here]]
    return indices


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    # Raw Philox words are the same in every version of numpy; Generator.permutation does not promise that.
    order = np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(num_examples), kind="stable")
    order.flags.writeable = False
    return order


def eval_batches(num_examples: int, batch_size: int) -> Iterator[np.ndarray]:
    """Indices of examples in file order, each once; the last batch may be short (see `fill_to` of `make_batch`).

    Args:
        num_examples: Examples in the data.
        batch_size: Examples a batch, over all hosts.

    Yields:
        Int64 [at most batch_size].
    """
    for start in range(0, num_examples, batch_size):
        yield np.arange(start, min(start + batch_size, num_examples), dtype=np.int64)
