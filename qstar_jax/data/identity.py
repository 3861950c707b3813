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
    digest = hashlib.sha256()
    digest_examples(digest, examples)
    for example in examples:
        for name, value in example.outcome.items():
            digest.update(name.encode() + np.asarray(value, "<f4").tobytes())
    return {"rows": len(examples), "sha256": digest.hexdigest()}


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
