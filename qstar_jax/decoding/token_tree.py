"""Policies that are tables of a `tabular.TokenTree`: every search can be run where the optimum is known exactly.

Several tables side by side, as `Ensemble((TreePolicy(tree),) * 3)`, are what `objectives.TableReward` reads.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.tabular import TokenTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TreeMemory:
    """States of the tree; S stands for all terminal states.

    Attributes:
        start: State that each prompt leads to. Shape [B].
        states: State after each token of the pool. Shape [B, M].
    """

    start: Int[Array, " B"]
    states: Int[Array, "B M"]

    def reorder(self, slots: Int[Array, "B N"]) -> "TreeMemory":
        """See `policies.Memory`."""
        return replace(self, states=jnp.take_along_axis(self.states, slots, axis=1))


@dataclass(frozen=True)
class TreePolicy:
    """A policy whose logits are a row of a table, passed on as they are: log pi, rewards, or values of the next states.

    Its parameters are the table, shape [S, V]; or one table per prompt, shape [B, S, V], so that one program solves a
    batch of MDPs. The first token of a prompt, whatever it is, stands for the MDP's prompt; further ones are steps
    down the tree. In terminal states, where nothing is chosen, the logits are 0.
    """

    tree: TokenTree

    def prefill(
        self,
        params: Float[Array, "*B S V"],
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, " B"],
        slots: int,
    ) -> tuple[Float[Array, "B V"], TreeMemory]:
        """See `policies.Policy`."""
        state = jnp.zeros(len(prompts), jnp.int32)
        for t in range(1, prompts.shape[1]):
            state = jnp.where(t < prompt_lengths, self._children[state, prompts[:, t]], state)
        memory = TreeMemory(state, jnp.zeros((len(prompts), slots), jnp.int32))
        return self._logits(params, state[:, None])[:, 0], memory

    def extend(
        self,
        params: Float[Array, "*B S V"],
        memory: TreeMemory,
        tokens: Int[Array, "B K"],
        path: Bool[Array, "B K M"],
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B K V"], TreeMemory]:
        """See `policies.Policy`; no token's path may hold another of the K tokens."""
        at = jnp.arange(path.shape[-1])
        new_slots = slot + jnp.arange(tokens.shape[1])
        # Slot of the token before; -1 stands for the prompt.
        before = jnp.where(path & (at != new_slots[:, None]), at, -1).max(-1)
        parents = jnp.take_along_axis(memory.states, jnp.maximum(before, 0), axis=1)
        parents = jnp.where(before < 0, memory.start[:, None], parents)
        states = self._children[parents, tokens]
        pool = jax.lax.dynamic_update_slice(memory.states, states, (jnp.zeros_like(slot), slot))
        return self._logits(params, states), replace(memory, states=pool)

    @property
    def _children(self) -> Int[Array, "states V"]:
        """Where each token leads; terminal states lead to themselves."""
        children = jnp.asarray(self.tree.children, jnp.int32)
        return jnp.pad(children, ((0, 1), (0, 0)), constant_values=len(children))

    def _logits(self, table: Array, states: Int[Array, "B K"]) -> Float[Array, "B K V"]:
        if table.shape[-2:] != self.tree.shape:
            raise ValueError(
                f"a table of shape {table.shape} does not fit this tree; expected {self.tree.shape} (states, tokens)"
            )
        table = jnp.broadcast_to(table, (len(states), *self.tree.shape))
        known = states < self.tree.shape[0]
        rows = jnp.take_along_axis(table, jnp.where(known, states, 0)[..., None], axis=1)
        return jnp.where(known[..., None], rows, 0.0)
