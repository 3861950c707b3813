"""Pairs each single response with one to another prompt, which KTO needs."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from qstar_jax.data.ragged import Lengths
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError


def with_mismatches(examples: Sequence[Example], max_length: int, source: str) -> "Mismatched":
    """Adds to each single response a second one, that of the next example with another prompt.

    KTO estimates the divergence of the policy from such mismatched pairs, as they are of no use to its reward.

    Args:
        examples: Examples with one response.
        max_length: Longest prompt and response together, in tokens; longer responses are truncated.
        source: Name of the data, for the error.

    Raises:
        InputError: All prompts are equal.
    """
    digests = [hashlib.blake2b(example.prompt.tobytes(), digest_size=16).digest() for example in examples]
    prompts = np.frombuffer(b"".join(digests), "V16")
    # Where the next example has another prompt; after the last one comes the first.
    changes = np.flatnonzero(prompts != np.roll(prompts, -1))
    if not len(changes):
        raise InputError(
            f"{source}: all examples have the same prompt; KTO compares responses with those to other prompts, so it "
            "needs at least two; choose implicit_prm, which does not"
        )
    count = np.arange(len(prompts))
    others = changes[np.searchsorted(changes, count) % len(changes)] + 1
    return Mismatched(examples, others % len(prompts), max_length)


class Mismatched(Sequence[Example]):
    """Examples whose second response is that of another one, made when they are asked for.

    Args:
        examples: Examples with one response.
        others: For each of them, the example that has its second response.
        max_length: Longest prompt and response together, in tokens; longer responses are truncated.

    Attributes:
        lengths: What is known of the examples without their tokens.
    """

    def __init__(self, examples: Sequence[Example], others: Int[np.ndarray, " N"], max_length: int):
        self._examples, self._others, self._max_length = examples, others, max_length
        own = Lengths.of(examples)
        room = max_length - own.prompts
        shortened = own.responses[others, 0] > room
        actions, turns = own.actions[others, 0], own.turns[others, 0]
        # Only where a response is shortened, its actions have to be counted.
        for i in np.flatnonzero(shortened).tolist():
            response = self[i].responses[1]
            actions[i], turns[i] = response.num_actions, response.num_turns
        self.lengths = Lengths(
            own.rows,
            own.prompts,
            np.column_stack([own.responses, np.minimum(own.responses[others, 0], room)]),
            np.column_stack([own.actions, actions]),
            np.column_stack([own.turns, turns]),
            np.column_stack([own.truncated, own.truncated[others, 1] | shortened]),
        )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, which):
        """Makes the example of an index, or a list of those of a slice."""
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        example, other = self._examples[which], self._examples[self._others[which]].responses[0]
        return replace(example, responses=(*example.responses, self._shortened(other, example)))

    def _shortened(self, response: Response, example: Example) -> Response:
        room = self._max_length - len(example.prompt)
        if len(response.ids) <= room:
            return response
        return Response(response.ids[:room], True, response.action_mask[:room], response.turns[:room])
