"""Brings examples of rankings and of single responses into the equal shapes that a batch needs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError

_EMPTY = Response(np.zeros(0, np.int32), truncated=False)
_REWARDS = "reference_rewards"


def fill_up(examples: Sequence[Example]) -> list[Example]:
    """Adds empty responses to rankings, and NaN to rewards of the reference, that are shorter than the longest."""
    places = max((len(example.responses) for example in examples), default=0)
    rewards = max((len(example.outcome.get(_REWARDS, ())) for example in examples), default=0)

    def fill(example: Example) -> Example:
        outcome = dict(example.outcome)
        if _REWARDS in outcome:
            missing = rewards - len(outcome[_REWARDS])
            outcome[_REWARDS] = np.pad(outcome[_REWARDS], (0, missing), constant_values=np.nan)
        more = (_EMPTY,) * (places - len(example.responses))
        return replace(example, responses=example.responses + more, outcome=outcome)

    return list(map(fill, examples))


def with_mismatches(examples: Sequence[Example], max_length: int, source: str) -> list[Example]:
    """Adds to each single response a second one, that of the next example with another prompt.

    KTO estimates the divergence of the policy from such mismatched pairs, as they are of no use to its reward.

    Args:
        examples: Examples with one response.
        max_length: Longest prompt and response together, in tokens; longer responses are truncated.
        source: Name of the data, for the error.

    Raises:
        InputError: All prompts are equal.
    """
    prompts = [example.prompt.tobytes() for example in examples]
    if len(set(prompts)) < 2:
        raise InputError(
            f"{source}: all examples have the same prompt; KTO compares responses with those to other prompts, so it "
            "needs at least two; choose implicit_prm, which does not"
        )
    # The next other prompt of each example, found backwards; the last ones continue at the beginning.
    count, others = len(examples), [0] * len(examples)
    for i in reversed(range(2 * count)):
        here, following = i % count, (i + 1) % count
        others[here] = following if prompts[here] != prompts[following] else others[following]
    return [
        replace(example, responses=(*example.responses, _shortened(examples[other].responses[0], example, max_length)))
        for example, other in zip(examples, others, strict=True)
    ]


def _shortened(response: Response, example: Example, max_length: int) -> Response:
    room = max_length - len(example.prompt)
    if len(response.ids) <= room:
        return response
    return Response(response.ids[:room], True, response.action_mask[:room], response.turns[:room])
