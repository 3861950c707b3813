"""Examples -> arrays of few shapes, and which examples make the batch of a step.

The batch is a pure function of (seed, step): a resumed run, on any number of hosts, sees the same rows in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.data.packing import Plan, Shapes, plan_batch
from qstar_jax.data.ragged import Ragged, ranges
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
        slots: Slots whose next token is scored, K per shard, counted through its sequences and padded with 0.
        targets: Those next tokens.
        index: Index of each action of each response among the M * K scored tokens; 0 elsewhere.
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
    slots: Int[Array, "M K"]
    targets: Int[Array, "M K"]
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

    def __repr__(self) -> str:
        """The shapes of its arrays, which are large."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shapes = [f"{name} {jax.tree.map(lambda x: getattr(x, 'shape', x), x)}" for name, x in values.items()]
        return f"Batch({', '.join(shapes)})"

    @property
    def num_actions(self) -> Int[Array, "B R"]:
        """Actions of each response: its length for losses and metrics."""
        return self.action_mask.sum(-1)


def make_batch(
    examples: Sequence[Example] | Ragged,
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
    examples = Ragged.of(examples)
    size = max(len(examples.lengths.rows), fill_to)
    if size % shapes.shards:
        raise ValueError(f"a batch of {size} examples cannot be sharded over {shapes.shards} devices")
    # Decide which blocks share a sequence, and how large the arrays are.
    plan = plan or plan_batch(examples, shapes, fill_to)
    sequences, scored = (max(sizes) for sizes in zip(plan.size, at_least, strict=True))
    # Allocate a batch of padding, with the lengths of its examples, and write the tokens.
    batch = _padding(examples, size, (sequences, scored), shapes)
    runs = _Runs.of(examples, plan, batch)
    _write_tokens(batch, examples, plan, runs)
    if shapes.text_length:
        batch = replace(batch, texts=_find_texts(batch, plan, runs, shapes.text_length))
    of_tokens = {"ref_logp": ref_logps, "guide_rewards": guide_rewards}
    padded = {name: _padded(values, batch.index.shape) for name, values in of_tokens.items() if values is not None}
    return replace(batch, **padded)


def _padding(examples: Ragged, count: int, size: tuple[int, int], shapes: Shapes) -> Batch:
    """Returns a batch of `count` examples with empty sequences."""
    (sequences, scored), lengths = size, examples.lengths
    tokens, positions, branches = np.zeros((3, sequences, shapes.length), np.int32)
    slots, targets = np.zeros((2, shapes.shards, scored), np.int32)
    tokens_shape = (count, lengths.responses.shape[1], shapes.response_length)
    action_mask, turns = np.zeros(tokens_shape, bool), np.full(tokens_shape, -1, np.int32)
    starts = np.arange(lengths.responses.size).reshape(lengths.responses.shape) * shapes.response_length
    target, source = ranges(starts, lengths.responses), ranges(examples.response_starts, lengths.responses)
    action_mask.reshape(-1)[target] = examples.action_mask[source]
    turns.reshape(-1)[target] = examples.turns[source]
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
        prompt_lengths=_filled(lengths.prompts.astype(np.int32), count),
        response_lengths=_filled(lengths.responses.astype(np.int32), count),
        truncated=_filled(lengths.truncated[:, 1:], count),
        weights=(np.arange(count) < len(lengths.rows)).astype(np.float32),
        outcome={name: _stacked(values, count) for name, values in examples.outcome.items()},
        shards=shapes.shards,
    )


@dataclass(frozen=True)
class _Runs:
    """Runs of slots: for each block the prompt without its last token, then a branch per response, one after the other.

    Attributes:
        lengths: Slots of each run. Shape [n, 1 + G], as below.
        slots: Its first slot, counted through the sequences.
        sources: Its first token among those of the examples; branches begin with that of their response.
        positions: Position of its first slot.
    """

    lengths: np.ndarray
    slots: np.ndarray
    sources: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, examples: Ragged, plan: Plan, batch: Batch) -> "_Runs":
        blocks, lengths = plan.blocks, examples.lengths
        prompts, own = lengths.prompts[blocks.examples], (blocks.examples[:, None], blocks.responses)
        run_lengths = np.column_stack([prompts - 1, lengths.responses[own]])
        # Blocks of a sequence follow each other, and so do the runs of a block.
        sequences = _sequences(plan, batch)
        starts = sequences * batch.tokens.shape[1] + _starts_in(sequences, blocks.lengths)
        slots = starts[:, None] + np.cumsum(run_lengths, 1) - run_lengths
        sources = np.column_stack([examples.prompt_starts[blocks.examples], examples.response_starts[own]])
        positions = np.where(np.arange(run_lengths.shape[1]) == 0, 0, (prompts - 1)[:, None])
        return cls(run_lengths, slots, sources, positions)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Repeats the value of each run, or block, for all its slots."""
        return np.repeat(np.broadcast_to(values, self.lengths.shape).ravel(), self.lengths.ravel())


def _sequences(plan: Plan, batch: Batch) -> np.ndarray:
    """Returns the sequence of each block in the whole batch."""
    return plan.shards * (len(batch.tokens) // batch.shards) + plan.sequences


def _starts_in(groups: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns where items begin that lie one after the other in groups; those of a group follow each other."""
    starts = np.cumsum(lengths) - lengths
    return starts - starts[np.searchsorted(groups, groups)]


def _write_tokens(batch: Batch, examples: Ragged, plan: Plan, runs: _Runs):
    """Writes all runs, and the actions that their slots predict."""
    slots_per_shard, width = batch.tokens.size // batch.shards, batch.slots.shape[1]
    branches = np.column_stack([np.zeros(len(plan.blocks.examples), np.int64), plan.blocks.responses + 1])
    slots, sources = ranges(runs.slots, runs.lengths), ranges(runs.sources, runs.lengths)
    branch, positions = runs.spread(branches), ranges(runs.positions, runs.lengths)
    # The inputs of a branch lag behind what it predicts by one token, and begin with the last one of the prompt.
    inputs = sources - (branch > 0)
    lasts = (examples.prompt_starts + examples.lengths.prompts - 1)[plan.blocks.examples]
    firsts = np.cumsum(runs.lengths.ravel()).reshape(runs.lengths.shape) - runs.lengths
    begun = (runs.lengths > 0) & (branches > 0)
    inputs[firsts[begun]] = np.broadcast_to(lasts[:, None], begun.shape)[begun]
    batch.tokens.reshape(-1)[slots] = examples.ids[inputs]
    batch.positions.reshape(-1)[slots] = positions
    batch.branches.reshape(-1)[slots] = branch
    # Number the blocks of each sequence.
    numbers = _starts_in(_sequences(plan, batch), np.ones_like(plan.shards))
    batch.blocks.reshape(-1)[slots] = runs.spread(numbers[:, None])
    # Slots that predict an action are scored. Actions keep the order of their slots.
    actions = np.flatnonzero((branch > 0) & examples.action_mask[sources])
    shards, in_shard = np.divmod(slots[actions], slots_per_shard)
    entries = np.arange(len(actions)) - np.searchsorted(shards, shards)
    batch.slots[shards, entries], batch.targets[shards, entries] = in_shard, examples.ids[sources[actions]]
    # Tell each action of a response where it is scored.
    _, places, tokens = batch.index.shape
    firsts = (plan.blocks.examples[:, None] * places + branches - 1) * tokens
    batch.index.reshape(-1)[ranges(firsts, runs.lengths)[actions]] = shards * width + entries


def _find_texts(batch: Batch, plan: Plan, runs: _Runs, length: int) -> Texts:
    """Lists the slots of each text, of at most `length` tokens, and the texts of each slot."""
    (count, sequence_length), (examples, responses, _) = batch.tokens.shape, batch.index.shape
    texts, shared_by = plan.blocks.examples[:, None] * responses + plan.blocks.responses, plan.blocks.responses.shape[1]
    slots = np.full((examples * responses, length), -1, np.int32)
    places = np.full((count, sequence_length, shared_by), -1, np.int32)
    # Numbers count within the sequences, and the texts, of a shard.
    slots_per_shard, texts_per_shard = count // batch.shards * sequence_length, len(slots) // batch.shards
    # A text is the shared run, then a branch; responses without tokens have none.
    branches = runs.lengths[:, 1:]
    shared = np.where(branches > 0, runs.lengths[:, :1], 0)
    used = np.cumsum(branches > 0, 1) - (branches > 0)  # texts of the block so far
    for run_slots, run_lengths, begin, entry in (
        (runs.slots[:, :1], shared, np.zeros_like(shared), used),
        (runs.slots[:, 1:], branches, shared, np.zeros_like(used)),
    ):
        at = ranges(np.broadcast_to(run_slots, run_lengths.shape), run_lengths)
        slots.reshape(-1)[ranges(texts * length + begin, run_lengths)] = at % slots_per_shard
        own = ranges(texts % texts_per_shard * length + begin, run_lengths)
        places.reshape(-1)[at * shared_by + np.repeat(entry.ravel(), run_lengths.ravel())] = own
    return Texts(slots, places, batch.shards)


def _filled(values: np.ndarray, count: int) -> np.ndarray:
    """Adds zeros for examples without tokens, which fill up a batch."""
    return np.concatenate([values, np.zeros((count - len(values), *values.shape[1:]), values.dtype)])


def _stacked(values: np.ndarray, count: int) -> np.ndarray:
    """Repeats the last value for examples without tokens, which fill up a batch."""
    return np.concatenate([values, np.repeat(values[-1:], count - len(values), axis=0)])


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
