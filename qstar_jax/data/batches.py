"""Examples -> arrays of few shapes, and which examples make the batch of a step.

The batch is a pure function of (seed, step): a resumed run, on any number of hosts, sees the same rows in order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.data.packing import Block, Plan, Shapes, plan_batch
from qstar_jax.data.tokenization import Example
from qstar_jax.models.masks import Texts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B prompts with R responses each (2: chosen, rejected; 1: fine-tuning), packed into N sequences of S slots.

    See `packing` for the layout. Masks come from lengths, positions and the actions of the examples, never from token
    ids. `action_mask` is no mask of attention, which sees all tokens.

    Attributes:
        tokens: Inputs of the model; 0 for padding, an id that every model has.
        positions: Rotary positions; those of each response continue those of its prompt.
        blocks: Which prompt of the sequence a slot belongs to, from 0; -1 for padding.
        branches: Which of its responses, from 1; 0 for what they share.
        slots: Slots whose next token is scored, K per sequence, padded with 0.
        targets: Those next tokens.
        index: Index of each action of each response among the N * K scored tokens; 0 elsewhere.
        action_mask: True at the tokens of a response that its policy chose (see `Response`); False after its end.
        turns: Turn of the assistant to which each token of a response belongs, from 0; -1 where the environment speaks
            and after the end.
        prompt_lengths: Tokens of each prompt.
        response_lengths: Tokens of each response, EOS included, whoever wrote them.
        truncated: The response lost its end, and its EOS.
        weights: 1, or 0 for empty examples that only fill up the last batch of an evaluation.
        ref_logp: Cached log pi_ref of the responses' actions in nats, if any; not read elsewhere.
        guide_rewards: Token rewards of the responses' actions by another model, if any; not read elsewhere.
        texts: Text b * R + r is response r of example b after its prompt; None if the shapes do not ask for texts.
        outcome: What was said of single responses: `labels` [B], or `rewards` [B] and `reference_rewards` [B, N].
        shards: Devices for which the batch was packed: the sequences of an example lie on the same device.
    """

    tokens: Int[Array, "N S"]
    positions: Int[Array, "N S"]
    blocks: Int[Array, "N S"]
    branches: Int[Array, "N S"]
    slots: Int[Array, "N K"]
    targets: Int[Array, "N K"]
    index: Int[Array, "B R T"]
    action_mask: Bool[Array, "B R T"]
    turns: Int[Array, "B R T"]
    prompt_lengths: Int[Array, " B"]
    response_lengths: Int[Array, "B R"]
    truncated: Bool[Array, "B R"]
    weights: Float[Array, " B"]
    ref_logp: Float[Array, "B R T"] | None = None
    guide_rewards: Float[Array, "B R T"] | None = None
    texts: Texts | None = None
    outcome: dict[str, Array] = field(default_factory=dict)
    shards: int = field(default=1, metadata={"static": True})

    @property
    def num_actions(self) -> Int[Array, "B R"]:
        """Actions of each response: its length for losses and metrics."""
        return self.action_mask.sum(-1)


def make_batch(
    examples: Sequence[Example],
    shapes: Shapes,
    *,
    fill_to: int = 0,
    ref_logps: Sequence[Sequence[np.ndarray]] | None = None,
    guide_rewards: Sequence[Sequence[np.ndarray]] | None = None,
    at_least: tuple[int, int] = (0, 0),
    plan: Plan | None = None,
) -> Batch:
    """Packs examples into the arrays of one batch.

    Args:
        examples: At least one; all with the same number of responses.
        shapes: Shapes of the dataset.
        fill_to: Add examples without tokens, of weight 0, up to this many.
        ref_logps: log pi_ref of each token of each response of each example, in nats.
        guide_rewards: Rewards of the same tokens by another model.
        at_least: N and K are at least these.
        plan: What `plan_batch` returned for these arguments, if it was called before.

    Returns:
        A batch of numpy arrays: int32, bool for `action_mask` and `truncated`, float32 for `weights` and `ref_logp`.

    Raises:
        ValueError: An example does not fit, or has another number of responses than the first; or the shards do not
            divide the batch.
    """
    size = max(len(examples), fill_to)
    if size % shapes.shards:
        raise ValueError(f"a batch of {size} examples cannot be sharded over {shapes.shards} devices")
    # Decide which blocks share a sequence, and how large the arrays are.
    plan = plan or plan_batch(examples, shapes, fill_to)
    sequences, scored = (max(sizes) for sizes in zip(plan.size, at_least, strict=True))
    # Allocate a batch of padding, with the lengths of its examples.
    batch = _padding(examples, size, (sequences, scored), shapes)
    # Write the tokens, sequence by sequence.
    for n, blocks in _numbered(plan, sequences):
        _write_sequence(batch, n, blocks, examples)
    if shapes.text_length:
        batch = replace(batch, texts=_find_texts(batch, plan, shapes.text_length))
    of_tokens = {"ref_logp": ref_logps, "guide_rewards": guide_rewards}
    padded = {name: _padded(values, batch.index.shape) for name, values in of_tokens.items() if values is not None}
    return replace(batch, **padded)


def _padding(examples: Sequence[Example], count: int, size: tuple[int, int], shapes: Shapes) -> Batch:
    """Returns a batch of `count` examples with empty sequences."""
    (sequences, scored), responses = size, len(examples[0].responses)
    tokens, positions, branches = np.zeros((3, sequences, shapes.length), np.int32)
    slots, targets = np.zeros((2, sequences, scored), np.int32)
    prompt_lengths, lengths = np.zeros(count, np.int32), np.zeros((count, responses), np.int32)
    truncated = np.zeros((count, responses), bool)
    tokens_shape = (count, responses, shapes.response_length)
    action_mask, turns = np.zeros(tokens_shape, bool), np.full(tokens_shape, -1, np.int32)
    for b, example in enumerate(examples):
        prompt_lengths[b] = len(example.prompt)
        lengths[b] = [len(r.ids) for r in example.responses]
        truncated[b] = [r.truncated for r in example.responses]
        for r, response in enumerate(example.responses):
            action_mask[b, r, : len(response.ids)] = response.action_mask
            turns[b, r, : len(response.ids)] = response.turns
    return Batch(
        tokens=tokens,
        positions=positions,
        blocks=np.full((sequences, shapes.length), -1, np.int32),
        branches=branches,
        slots=slots,
        targets=targets,
        index=np.zeros(tokens_shape, np.int32),
        action_mask=action_mask,
        turns=turns,
        prompt_lengths=prompt_lengths,
        response_lengths=lengths,
        truncated=truncated,
        weights=(np.arange(count) < len(examples)).astype(np.float32),
        outcome={name: _stacked([e.outcome[name] for e in examples], count) for name in examples[0].outcome},
        shards=shapes.shards,
    )


def _numbered(plan: Plan, count: int) -> Iterator[tuple[int, list[Block]]]:
    """Yields the sequences of a plan with their numbers in a batch of `count`."""
    for shard, sequences in enumerate(plan.shards):
        yield from enumerate(sequences, start=shard * count // len(plan.shards))


def _write_sequence(batch: Batch, n: int, blocks: Sequence[Block], examples: Sequence[Example]):
    """Writes the blocks of sequence `n` one after the other."""
    width = batch.slots.shape[1]
    slot = entry = 0  # the next free slot, and the next free entry of `slots` and `targets`
    for number, block in enumerate(blocks):
        example = examples[block.example]
        batch.blocks[n, slot : slot + block.length] = number
        # The prompt once, without its last token.
        shared = len(example.prompt) - 1
        batch.tokens[n, slot : slot + shared] = example.prompt[:-1]
        batch.positions[n, slot : slot + shared] = np.arange(shared)
        slot += shared
        # A branch per response, in which each slot predicts the response's next token; actions are scored.
        for r in block.responses:
            ids, actions = example.responses[r].ids, np.flatnonzero(example.responses[r].action_mask)
            if len(ids) == 0:
                continue
            branch, entries = np.arange(slot, slot + len(ids)), np.arange(entry, entry + len(actions))
            batch.tokens[n, branch] = [example.prompt[-1], *ids[:-1]]
            batch.positions[n, branch] = shared + np.arange(len(ids))
            batch.branches[n, branch] = r + 1
            batch.slots[n, entries], batch.targets[n, entries] = branch[actions], ids[actions]
            batch.index[block.example, r, actions] = n * width + entries
            slot, entry = slot + len(ids), entry + len(actions)


def _find_texts(batch: Batch, plan: Plan, length: int) -> Texts:
    """Lists the slots of each text, of at most `length` tokens, and the texts of each slot."""
    (count, sequence_length), (examples, responses, _) = batch.tokens.shape, batch.index.shape
    slots = np.full((examples * responses, length), -1, np.int32)
    shared_by = max(len(block.responses) for _, blocks in _numbered(plan, count) for block in blocks)
    places = np.full((count, sequence_length, shared_by), -1, np.int32)
    # Numbers count within the sequences, and the texts, of a shard.
    sequences_per_shard, texts_per_shard = count // batch.shards, len(slots) // batch.shards
    for n, blocks in _numbered(plan, count):
        for number, block in enumerate(blocks):
            in_block, branches = batch.blocks[n] == number, batch.branches[n]
            used = 0  # texts of the block so far: one for each response that has tokens
            for r in block.responses:
                if not (in_block & (branches == r + 1)).any():
                    continue
                tokens, text = np.flatnonzero(in_block & np.isin(branches, (0, r + 1))), block.example * responses + r
                slots[text, : len(tokens)] = n % sequences_per_shard * sequence_length + tokens
                entries = np.where(branches[tokens] == 0, used, 0)  # tokens of a branch are in a single text
                places[n, tokens, entries] = text % texts_per_shard * length + np.arange(len(tokens))
                used += 1
    return Texts(slots, places, batch.shards)


def _stacked(values: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Stacks what examples have; those without tokens, which fill up a batch, repeat the last one."""
    return np.stack([*values, *[values[-1]] * (count - len(values))])


def _padded(values: Sequence[Sequence[np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    padded = np.zeros(shape, np.float32)
    for b, responses in enumerate(values):
        for r, response in enumerate(responses):
            padded[b, r, : len(response)] = response
    return padded


def step_indices(seed: int, step: int, num_examples: int, batch_size: int) -> np.ndarray:
    """Returns the examples of a step: shuffled each epoch; batches span epochs, so that no example is skipped.

    Args:
        seed: Fixes the order; at least 0.
        step: Counted from 0.
        num_examples: Examples in the data, at least 1.
        batch_size: Examples per step, over all hosts; may exceed `num_examples`.

    Returns:
        Indices of examples, int64 [batch_size].
    """
    positions = np.arange(batch_size, dtype=np.int64) + step * batch_size
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = _epoch_order(seed, int(epoch), num_examples)[offsets[in_epoch]]
    return indices


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    # Raw Philox words are the same in every version of numpy; Generator.permutation does not promise that.
    order = np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(num_examples), kind="stable")
    order.flags.writeable = False
    return order
