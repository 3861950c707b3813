"""Examples as arrays: lengths of all, and tokens of some one after the other, so that no loop visits each example."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from qstar_jax.data.tokenization import Example


@dataclass(frozen=True)
class Lengths:
    """What is known of examples without their tokens.

    Attributes:
        rows: Index of the row of each example, from 0.
        prompts: Tokens of each prompt.
        responses: Tokens of each response, whoever wrote them.
        actions: Actions of each response.
        turns: Turns of the assistant with an action in each response.
        truncated: Whether each prompt lost its beginning, then whether each response lost its end.
    """

    rows: Int[np.ndarray, " B"]
    prompts: Int[np.ndarray, " B"]
    responses: Int[np.ndarray, "B R"]
    actions: Int[np.ndarray, "B R"]
    turns: Int[np.ndarray, "B R"]
    truncated: Bool[np.ndarray, "B 1+R"]

    @classmethod
    def of(cls, examples: "Sequence[Example] | Lengths | Ragged") -> "Lengths":
        """Collects the lengths of examples.

        Raises:
            ValueError: They have different numbers of responses.
        """
        if isinstance(examples, Lengths):
            return examples
        if (lengths := getattr(examples, "lengths", None)) is not None:
            return lengths
        for example in examples:
            if len(example.responses) != len(examples[0].responses):
                raise ValueError(
                    f"row {example.row + 1} has {len(example.responses)} responses and the first of its batch "
                    f"{len(examples[0].responses)}; all examples of a dataset need the same number"
                )
        shape = (len(examples), len(examples[0].responses) if len(examples) else 0)
        return cls(
            np.array([e.row for e in examples], np.int64),
            np.array([len(e.prompt) for e in examples], np.int64),
            np.array([len(r.ids) for e in examples for r in e.responses], np.int64).reshape(shape),
            np.array([r.num_actions for e in examples for r in e.responses], np.int64).reshape(shape),
            np.array([r.num_turns for e in examples for r in e.responses], np.int64).reshape(shape),
            np.array([[e.prompt_truncated, *(r.truncated for r in e.responses)] for e in examples], bool),
        )

    def __getitem__(self, which: Int[np.ndarray, " b"]) -> "Lengths":
        """Selects examples."""
        return Lengths(**{name: values[which] for name, values in vars(self).items()})

    @property
    def texts(self) -> Int[np.ndarray, " B"]:
        """Tokens of each prompt with its longest response."""
        return self.prompts + self.responses.max(1, initial=0)


@dataclass(frozen=True)
class Ragged:
    """Some examples with their tokens.

    Attributes:
        lengths: Their lengths.
        ids: Tokens of the first prompt, then of its responses, then of the next prompt, and so on.
        action_mask: True at the actions among these tokens.
        turns: Turn of the assistant to which each of them belongs; -1 in prompts, and where the environment speaks.
        outcome: What was said of single responses, stacked along the first axis.
    """

    lengths: Lengths
    ids: Int[np.ndarray, " M"]
    action_mask: Bool[np.ndarray, " M"]
    turns: Int[np.ndarray, " M"]
    outcome: dict[str, np.ndarray]

    @classmethod
    def of(cls, examples: "Sequence[Example] | Ragged") -> "Ragged":
        """Concatenates the tokens of at least one example."""
        if isinstance(examples, Ragged):
            return examples
        parts = [part for e in examples for part in (e.prompt, *(r.ids for r in e.responses))]
        masks = [part for e in examples for part in (np.zeros(len(e.prompt), bool), *_of(e, "action_mask"))]
        turns = [part for e in examples for part in (np.full(len(e.prompt), -1, np.int32), *_of(e, "turns"))]
        return cls(
            Lengths.of(examples),
            np.concatenate(parts).astype(np.int32, copy=False),
            np.concatenate(masks),
            np.concatenate(turns),
            {name: np.stack([e.outcome[name] for e in examples]) for name in examples[0].outcome},
        )

    @classmethod
    def take(cls, examples: Sequence[Example], indices: Int[np.ndarray, " B"]) -> "Ragged":
        """Selects examples of a dataset."""
        if (take := getattr(examples, "take", None)) is not None:
            return take(indices)
        return cls.of([examples[i] for i in indices])

    @property
    def prompt_starts(self) -> Int[np.ndarray, " B"]:
        """Where the tokens of each example begin."""
        totals = self.lengths.prompts + self.lengths.responses.sum(1)
        return np.cumsum(totals) - totals

    @property
    def response_starts(self) -> Int[np.ndarray, "B R"]:
        """Where the tokens of each response begin."""
        lengths = self.lengths.responses
        return (self.prompt_starts + self.lengths.prompts)[:, None] + np.cumsum(lengths, 1) - lengths


def ranges(starts: Int[np.ndarray, "..."], lengths: Int[np.ndarray, "..."]) -> Int[np.ndarray, " M"]:
    """Concatenates the numbers from each start on, as many as its length says."""
    starts, lengths = starts.ravel(), lengths.ravel()
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _of(example: Example, name: str) -> list[np.ndarray]:
    return [getattr(response, name) for response in example.responses]
