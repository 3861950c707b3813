"""The trees of Monte-Carlo tree search, in the words of mctx: node 0 is the root, its actions are tokens.

Differences from mctx: each node considers tokens of its own (`Children.tokens`), the values of actions are known before
they are visited, and the end of a response is no node, as its value is known.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.objectives import StepScores
from qstar_jax.decoding.partial import Partial

UNVISITED, COMPLETE, DEAD_END = -1, -2, -3  # what an action leads to, where it is no node
NO_PARENT = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Children:
    """The A most likely tokens of nodes, best first. Shapes [B, N, A], or [B, A] for one node of each tree.

    Attributes:
        tokens: Token ids.
        valid: Whether there is such a token; fewer than A may be possible.
        prior_logits: log pi among these A tokens, in nats.
        rewards: The objective's scores.
        values: Value of the next node: the objective's value until there is such a node, then the node's.
        logp: log pi over the whole vocabulary, in nats.
        ref_logp: The same under the reference, or None without one.
        index: The next node; UNVISITED, COMPLETE where a response ends, DEAD_END where no token is possible after it.
        visits: Simulations that went through it.
    """

    tokens: Int[Array, "*N A"]
    valid: Bool[Array, "*N A"]
    prior_logits: Float[Array, "*N A"]
    rewards: Float[Array, "*N A"]
    values: Float[Array, "*N A"]
    logp: Float[Array, "*N A"]
    ref_logp: Float[Array, "*N A"] | None
    index: Int[Array, "*N A"]
    visits: Int[Array, "*N A"]

    @property
    def qvalues(self) -> Float[Array, "*N A"]:
        """Reward and value of each action, undiscounted."""
        return self.rewards + self.values

    @property
    def scores(self) -> StepScores:
        """What `Partial.append` adds up."""
        return StepScores(self.rewards, self.values, self.logp, self.ref_logp)

    @classmethod
    def of_step(cls, step: StepScores, num_actions: int) -> "Children":
        """Makes the children of one new node per tree, none of them visited.

        Args:
            step: Scores of the tokens that may follow. Shape [B, V].
            num_actions: How many of them become children, A; all of a smaller vocabulary.
        """
        possible = (step.score > -jnp.inf) & (step.logp > -jnp.inf)
        logp = jnp.where(possible, step.logp, -jnp.inf)
        logp, tokens = jax.lax.top_k(logp, min(num_actions, logp.shape[-1]))
        valid = logp > -jnp.inf

        def pick(x: Array) -> Array:
            return jnp.where(valid, jnp.take_along_axis(x, tokens, axis=-1), 0.0)

        rewards = pick(step.score)
        # A large finite number, so that a node without any possible token has no NaN.
        prior_logits = jax.nn.log_softmax(jnp.where(valid, logp, jnp.finfo(logp.dtype).min / 2))
        return cls(
            tokens=tokens.astype(jnp.int32),
            valid=valid,
            prior_logits=prior_logits.astype(rewards.dtype),
            rewards=rewards,
            values=jnp.zeros_like(rewards) if step.value is None else pick(step.value).astype(rewards.dtype),
            logp=pick(step.logp),
            ref_logp=None if step.ref_logp is None else pick(step.ref_logp),
            index=jnp.full(tokens.shape, UNVISITED, jnp.int32),
            visits=jnp.zeros(tokens.shape, jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tree:
    """One tree per prompt. Node 0 is the root, simulation i makes node i + 1, or none.

    Attributes:
        node_visits: Simulations that ended in a node or went through it; 0 where there is no node. Shape [B, N].
        raw_values: The objective's value of each node. Shape [B, N].
        node_values: Mean of the values that came back, the raw one among them. Shape [B, N].
        parents: Each node's parent; NO_PARENT for the root and where there is no node. Shape [B, N].
        action_from_parent: The parent's action that leads to it. Shape [B, N].
        children: The actions of each node. Shape [B, N, A].
        prefixes: The tokens from the root to each node (in mctx: embeddings). Shapes [B, N, ...].
        unvisited: Valid actions not visited yet; at 0 a tree is exhausted and its search over. Shape [B].
        root_gumbel: Noise on the root's actions. Shape [B, A].
    """

    node_visits: Int[Array, "B N"]
    raw_values: Float[Array, "B N"]
    node_values: Float[Array, "B N"]
    parents: Int[Array, "B N"]
    action_from_parent: Int[Array, "B N"]
    children: Children
    prefixes: Partial
    unvisited: Int[Array, " B"]
    root_gumbel: Float[Array, "B A"]

    def at(self, node_index: Int[Array, " B"]) -> "Node":
        """Looks at one node of each tree."""
        index = jnp.arange(len(node_index)), node_index
        values = (x[index] for x in (self.node_visits, self.node_values, self.raw_values))
        return Node(jax.tree.map(lambda x: x[index], self.children), *values)

    def most_visited(self) -> Int[Array, " B"]:
        """The last node on the path of the most visited actions; ties go to the most likely. Shape [B]."""
        row = jnp.arange(len(self.parents))

        def next_node(node: Array) -> Array:
            action = self.children.visits[row, node].argmax(-1)
            return self.children.index[row, node, action]

        def descend(node: Array) -> Array:
            return jnp.where(next_node(node) >= 0, next_node(node), node)

        return jax.lax.while_loop(
            lambda node: (next_node(node) >= 0).any(), descend, jnp.zeros(len(self.parents), jnp.int32)
        )


@dataclass(frozen=True)
class Node:
    """What the choice of an action reads of one node per tree.

    Attributes:
        children: Its actions. Shape [B, A].
        visits: Its visits. Shape [B].
        value: Its mean value. Shape [B].
        raw_value: Its raw value. Shape [B].
    """

    children: Children
    visits: Int[Array, " B"]
    value: Float[Array, " B"]
    raw_value: Float[Array, " B"]
