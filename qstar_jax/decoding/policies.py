"""What a search sees of models: logits of the next token at the end of every path, and a memory that it passes on.

A search appends one token to each of K paths per prompt, again and again. Tokens are kept in a pool of slots in the
order in which they were made, and a path is a mask over the pool; so beams share what they have in common, a search
tree needs one slot per node, and nothing is ever copied.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int

Logits = Float[Array, "*B V"] | tuple[Float[Array, "*B _"], ...]


@runtime_checkable
class Memory(Protocol):
    """A pytree in which a policy keeps what it needs of prompts and pools."""

    def reorder(self, slots: Int[Array, "B M"]) -> "Memory":
        """Moves the pool: slot m of the new pool holds what slot `slots[:, m]` of this one holds."""


@runtime_checkable
class Policy(Protocol):
    """A model as searches use it; hashable, since it is a static argument. `models.CausalLM` is one."""

    def prefill(
        self, params: Any, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, " B"], slots: int
    ) -> tuple[Logits, Memory]:
        """Reads right-padded prompts; returns logits of the first new token [B, V] and a pool of empty slots."""

    def extend(
        self,
        params: Any,
        memory: Memory,
        tokens: Int[Array, "B K"],
        path: Bool[Array, "B K M"],
        slot: Int[Array, ""],
    ) -> tuple[Logits, Memory]:
        """Puts tokens into the pool's slots `slot` .. `slot + K - 1`; returns logits [B, K, V] of what follows them.

        `path` is True at the slots of the tokens before each token, which are in order, and at the token's own slot.
        """


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EnsembleMemory:
    """Memories of several policies."""

    members: tuple[Memory, ...]

    def reorder(self, slots: Int[Array, "B M"]) -> "EnsembleMemory":
        """See `Memory`."""
        return EnsembleMemory(tuple(member.reorder(slots) for member in self.members))


@dataclass(frozen=True)
class Ensemble:
    """Policies that read the same tokens together, such as a policy and its reference.

    Its parameters are a tuple, and so are its logits; an objective makes one score of them.
    """

    members: tuple[Policy, ...]

    def prefill(self, params, prompts, prompt_lengths, slots):
        """See `Policy`."""
        outputs = [m.prefill(p, prompts, prompt_lengths, slots) for m, p in zip(self.members, params, strict=True)]
        logits, memories = zip(*outputs, strict=True)
        return logits, EnsembleMemory(memories)

    def extend(self, params, memory, tokens, path, slot):
        """See `Policy`."""
        members = zip(self.members, params, memory.members, strict=True)
        logits, memories = zip(*[m.extend(p, kept, tokens, path, slot) for m, p, kept in members], strict=True)
        return logits, EnsembleMemory(memories)
