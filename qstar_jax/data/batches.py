"""Examples -> arrays of few shapes, and which examples make the batch of a step.

The batch is a pure function of (seed, step): a resumed run, on any number of hosts, sees the same rows in order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.data.packing import Shapes, blocks_of, pack
from qstar_jax.data.tokenization import Example


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B prompts with R answers each (2: chosen, rejected; 1: fine-tuning), laid into N rows of S slots (see `packing`).

    Masks come from lengths and from where tokens lie, not from token ids.

    Args:
        tokens: Inputs of the model; 0 for padding, which any model knows, whatever its tokenizer pads with.
        positions: Rotary positions; those of each answer go on from its prompt.
        blocks: Which prompt of the row a slot belongs to, from 0; -1 for padding.
        branches: Which of its answers, from 1; 0 for what they share.
        slots: Slots whose next token is scored, K a row; 0 where there are fewer.
        targets: Those next tokens.
        index: Where each token of each answer stands among the N * K scored ones; 0 after its end.
        prompt_lengths: Tokens of each prompt.
        response_lengths: Tokens of each answer, EOS included.
        truncated: The answer lost its end, and its EOS.
        weights: 1, or 0 for examples that only fill up the last batch of an evaluation, and have no tokens.
        ref_logp: log pi_ref of the answers' tokens in nats, where it is cached.
    """

    tokens: Int[Array, "N S"]
    positions: Int[Array, "N S"]
    blocks: Int[Array, "N S"]
    branches: Int[Array, "N S"]
    slots: Int[Array, "N K"]
    targets: Int[Array, "N K"]
    index: Int[Array, "B R T"]
    prompt_lengths: Int[Array, " B"]
    response_lengths: Int[Array, "B R"]
    truncated: Bool[Array, "B R"]
    weights: Float[Array, " B"]
    ref_logp: Float[Array, "B R T"] | None = None

    @property
    def response_mask(self) -> Bool[Array, "B R T"]:
        """True at the tokens of `index` that are the answer's."""
        return self.response_lengths[..., None] > np.arange(self.index.shape[-1])


def make_batch(
    examples: Sequence[Example],
    shapes: Shapes,
    *,
    fill_to: int | None = None,
    ref_logps: Sequence[Sequence[np.ndarray]] | None = None,
    at_least: tuple[int, int] = (0, 0),
) -> Batch:
    """Lays examples into rows.

    Args:
        examples: At least one; all with the same number of answers.
        shapes: Shapes of the data set.
        fill_to: Add examples without tokens, of weight 0, up to so many.
        ref_logps: log pi_ref of each token of each answer of each example, in nats.
        at_least: N and K are at least these.

    Returns:
        A batch of numpy arrays: int32, bool for `truncated`, float32 for `weights` and `ref_logp`.

    Raises:
        ValueError: An example does not fit, or has another number of answers than the first.
    """
    count, answers = max(len(examples), fill_to or 0), len(examples[0].responses)
    _check(examples, shapes)
    rows = pack(blocks_of(examples, shapes.layout), shapes.length, shapes.layout)
    # Without packing the number of rows is known before, and is that of a full batch.
    wanted = len(rows) if shapes.layout == "packed" else count * (answers if shapes.layout == "plain" else 1)
    height = max(-(-wanted // shapes.rows) * shapes.rows, at_least[0])
    scored = max(sum(block.scored for block in row) for row in rows)
    width = max(-(-scored // shapes.scored) * shapes.scored, shapes.scored, at_least[1])
    tokens, positions, branches = np.zeros((3, height, shapes.length), np.int32)
    blocks = np.full((height, shapes.length), -1, np.int32)
    slots, targets = np.zeros((2, height, width), np.int32)
    index = np.zeros((count, answers, shapes.response_length), np.int32)
    for n, row in enumerate(rows):
        slot, entry = 0, 0
        for number, block in enumerate(row):
            example = examples[block.example]
            shared = len(example.prompt) - 1
            blocks[n, slot : slot + block.length] = number
            tokens[n, slot : slot + shared] = example.prompt[:-1]
            positions[n, slot : slot + shared] = np.arange(shared)
            slot += shared
            for r in block.answers:
                ids = example.responses[r].ids
                if len(ids) == 0:
                    continue
                branch, entries = slice(slot, slot + len(ids)), slice(entry, entry + len(ids))
                tokens[n, branch] = [example.prompt[-1], *ids[:-1]]
                positions[n, branch] = shared + np.arange(len(ids))
                branches[n, branch] = r + 1
                slots[n, entries], targets[n, entries] = np.arange(branch.start, branch.stop), ids
                index[block.example, r, : len(ids)] = n * width + np.arange(entries.start, entries.stop)
                slot, entry = branch.stop, entries.stop
    empty = [0] * (count - len(examples))
    return Batch(
        tokens=tokens,
        positions=positions,
        blocks=blocks,
        branches=branches,
        slots=slots,
        targets=targets,
        index=index,
        prompt_lengths=np.array([len(e.prompt) for e in examples] + empty, np.int32),
        response_lengths=np.array(
            [[len(r.ids) for r in e.responses] for e in examples] + [[0] * answers] * len(empty), np.int32
        ),
        truncated=np.array(
            [[r.truncated for r in e.responses] for e in examples] + [[False] * answers] * len(empty), bool
        ),
        weights=(np.arange(count) < len(examples)).astype(np.float32),
        ref_logp=None if ref_logps is None else _padded(ref_logps, index.shape),
    )


def _padded(values: Sequence[Sequence[np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    padded = np.zeros(shape, np.float32)
    for b, answers in enumerate(values):
        for r, answer in enumerate(answers):
            padded[b, r, : len(answer)] = answer
    return padded


def _check(examples: Sequence[Example], shapes: Shapes) -> None:
    answers = len(examples[0].responses)
    for example in examples:
        if len(example.responses) != answers:
            raise ValueError(
                f"row {example.row + 1} has {len(example.responses)} answers and the first of its batch {answers}; "
                "all examples of a data set need the same number"
            )
    for block in blocks_of(examples, shapes.layout):
        example = examples[block.example]
        longest = max(len(r.ids) for r in example.responses)
        if block.length > shapes.length or longest > shapes.response_length:
            raise ValueError(
                f"row {example.row + 1}: {block.length} tokens of prompt and answers, and an answer of {longest}, do "
                f"not fit into length {shapes.length} and response_length {shapes.response_length}; "
                "take them from Shapes.of"
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
