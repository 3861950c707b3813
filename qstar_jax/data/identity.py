"""Identities of tokenizers and of examples: what outputs and caches depend on."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qstar_jax.data.tokenization import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of what maps text to ids: vocabulary, rules, special tokens and chat templates."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # set by every call
        rules.pop(state, None)
    parts = [rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def examples_identity(examples: Sequence[Example]) -> dict[str, Any]:
    """Identifies examples by their number and a digest of their tokens, labels and rewards in order."""
    if (identity := getattr(examples, "identity", None)) is not None:
        return identity
    digest = ExamplesDigest()
    for example in examples:
        digest.add(example)
    return digest.identity


class ExamplesDigest:
    """Computes `examples_identity` of examples that come one after the other."""

    def __init__(self):
        self._count, self._tokens, self._outcome = 0, hashlib.sha256(), bytearray()
        self._shapes: set[tuple[int, int]] = set()

    def add(self, example: Example):
        """Adds the next example."""
        self._count += 1
        self._shapes.add((len(example.responses), len(example.outcome.get("reference_rewards", ()))))
        digest_examples(self._tokens, [example])
        for name, value in example.outcome.items():
            self._outcome += name.encode() + np.asarray(value, "<f4").tobytes()

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the examples so far."""
        digest = self._tokens.copy()
        digest.update(self._outcome)
        return {"rows": self._count, "sha256": digest.hexdigest()}

    @property
    def uniform(self) -> bool:
        """Whether no example has to be filled up, which would change its digest."""
        return len(self._shapes) <= 1


def digest_examples(digest: "hashlib._Hash", examples: Sequence[Example]):
    """Adds the tokens of examples to a digest, in order: prompts, responses, and which of their tokens are actions."""
    for example in examples:
        sequences = [example.prompt, *(response.ids for response in example.responses)]
        # Lengths come first, or a token could move from a prompt to its response unnoticed.
        digest.update(np.array([len(sequences), *map(len, sequences)], "<i8"))
        for ids in sequences:
            digest.update(np.ascontiguousarray(ids, "<i4"))
        # Responses of one turn add nothing, so that what was stored for them stays valid.
        for response in example.responses:
            if not response.action_mask.all() or response.turns.any():
                digest.update(np.where(response.action_mask, response.turns, -1).astype("<i4"))
