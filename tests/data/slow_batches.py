"""Batches made token by token, as an oracle of those that are made from whole arrays."""

import numpy as np


def slow_plan(examples, shapes, fill_to=0):
    """Lists [(example, responses), ...] for each sequence of each shard."""
    blocks = []
    for i, example in enumerate(examples):
        responses = range(len(example.responses))
        blocks += [(i, (r,)) for r in responses] if shapes.layout == "plain" else [(i, tuple(responses))]

    def slots(block):
        i, responses = block
        return len(examples[i].prompt) - 1 + sum(len(examples[i].responses[r].ids) for r in responses)

    per_shard = max(len(examples), fill_to) // shapes.shards
    shards = []
    for shard in range(shapes.shards):
        own = [block for block in blocks if block[0] // per_shard == shard]
        sequences = [[block] for block in own]
        if shapes.layout == "packed":
            sequences = []
            for block in sorted(own, key=slots, reverse=True):  # stable
                fits = (s for s in sequences if sum(map(slots, s)) + slots(block) <= shapes.length)
                if (sequence := next(fits, None)) is None:
                    sequences.append(sequence := [])
                sequence.append(block)
        shards.append(sequences)
    return shards


def slow_batch(examples, shapes, fill_to=0):
    """Returns the arrays of a batch by name, without padding between the sequences of shards and after them."""
    size, responses = max(len(examples), fill_to), len(examples[0].responses)
    shards = slow_plan(examples, shapes, fill_to)

    def up(number, multiple):
        return max(-(-number // multiple), 1) * multiple

    def scored(sequence):
        return sum(int(examples[i].responses[r].action_mask.sum()) for i, group in sequence for r in group)

    per_shard = size // shapes.shards * (responses if shapes.layout == "plain" else 1)
    most = max(map(len, shards)) if shapes.layout == "packed" else per_shard
    per_shard = up(most, shapes.sequences)
    count, width = per_shard * shapes.shards, up(max(sum(map(scored, shard)) for shard in shards), shapes.scored)
    sequence, scored_slots = (count, shapes.length), (shapes.shards, width)
    zeros = {"tokens": sequence, "positions": sequence, "branches": sequence}
    zeros |= {"slots": scored_slots, "targets": scored_slots}
    batch = {name: np.zeros(shape, np.int32) for name, shape in zeros.items()}
    batch["blocks"] = np.full((count, shapes.length), -1, np.int32)
    shape = (size, responses, shapes.response_length)
    batch |= {"index": np.zeros(shape, np.int32), "action_mask": np.zeros(shape, bool)}
    batch["turns"] = np.full(shape, -1, np.int32)
    batch["texts"] = {}  # (example, response) -> its slots
    for shard, sequences in enumerate(shards):
        entry = 0  # the next of the shard's scored slots
        for n, sequence in enumerate(sequences):
            entry = _write(batch, shard, shard * per_shard + n, n * shapes.length, entry, sequence, examples)
    return batch


def _write(batch, shard, n, first, entry, sequence, examples):
    """Writes sequence n, whose first slot is number `first` of its shard; returns the next scored one."""
    slot = 0
    for number, (i, group) in enumerate(sequence):
        example, shared = examples[i], []
        for position, token in enumerate(example.prompt[:-1]):
            batch["tokens"][n, slot], batch["positions"][n, slot], batch["blocks"][n, slot] = token, position, number
            shared.append(slot)
            slot += 1
        for r in group:
            response, token = example.responses[r], example.prompt[-1]
            batch["texts"][i, r] = list(shared) if len(response.ids) else []
            for t, following in enumerate(response.ids):
                batch["tokens"][n, slot], batch["blocks"][n, slot] = token, number
                batch["positions"][n, slot] = len(example.prompt) - 1 + t
                batch["branches"][n, slot] = r + 1
                batch["turns"][i, r, t] = response.turns[t]
                if response.action_mask[t]:
                    batch["slots"][shard, entry], batch["targets"][shard, entry] = first + slot, following
                    batch["index"][i, r, t] = shard * batch["slots"].shape[1] + entry
                    batch["action_mask"][i, r, t] = True
                    entry += 1
                batch["texts"][i, r].append(slot)
                token, slot = following, slot + 1
    return entry
