"""The tree that Monte-Carlo tree search grows, and the two rules by which it chooses where to look next.

Definitions are those of mctx, whose trees come out the same, node for node: values are running means, a node's own
value counts as its first visit, and both rules normalise values within a node; so a number that is added to the value
of every state and handed on from state to state (potential-based shaping) changes no choice.

References:
    arXiv 1911.08265, appendix B (PUCT); Danihelka et al., "Policy improvement by planning with Gumbel", ICLR 2022.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from qstar_jax.decoding.objectives import StepScores

UNVISITED, COMPLETE, DEAD_END = -1, -2, -3  # what an edge leads to, where it is no node
EPSILON = 1e-8  # smallest range of values that is stretched to 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edges:
    """The A likeliest tokens of nodes, the likeliest first. Shapes [B, N, A], of one node a row [B, A].

    Attributes:
        tokens: Token ids.
        valid: Whether there is such a token; fewer than A may be possible.
        priors: log pi among these A tokens, in nats.
        rewards: The objective's scores.
        values: Value of where each leads, as the objective says it.
        logp: log pi over the whole vocabulary, in nats.
        ref_logp: The same under the reference, or None without one.
        children: Node it leads to; UNVISITED, or COMPLETE for an answer that ends there, or DEAD_END for a node in
            which no token is possible.
        visits: Simulations that went through it.
    """

    tokens: Int[Array, "*N A"]
    valid: Bool[Array, "*N A"]
    priors: Float[Array, "*N A"]
    rewards: Float[Array, "*N A"]
    values: Float[Array, "*N A"]
    logp: Float[Array, "*N A"]
    ref_logp: Float[Array, "*N A"] | None
    children: Int[Array, "*N A"]
    visits: Int[Array, "*N A"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tree:
    """One tree a prompt. Node 0 is the prompt, node i was made by simulation i - 1, which may have made none.

    Attributes:
        parents: Each node's parent; -1 for the root and where there is no node. Shape [B, N].
        actions: Which of its parent's edges it hangs on. Shape [B, N].
        tokens: Its token. Shape [B, N].
        depths: Tokens from the root. Shape [B, N].
        visits: Simulations that ended in it or went through it; 0 where there is no node. Shape [B, N].
        values: Mean of what came back, its own value counted once. Shape [B, N].
        raw_values: Its own value. Shape [B, N].
        scores: Sum of the objective's scores from the root. Shape [B, N].
        logps: Sum of log pi from the root, in nats. Shape [B, N].
        ref_logps: The same under the reference, or None without one. Shape [B, N].
        edges: The tokens that may follow. Shape [B, N, A].
        unvisited: Edges not yet visited; at 0, a tree is exhausted and the search of its row over. Shape [B].
        gumbel: Noise on the root's edges. Shape [B, A].
    """

    parents: Int[Array, "B N"]
    actions: Int[Array, "B N"]
    tokens: Int[Array, "B N"]
    depths: Int[Array, "B N"]
    visits: Int[Array, "B N"]
    values: Float[Array, "B N"]
    raw_values: Float[Array, "B N"]
    scores: Float[Array, "B N"]
    logps: Float[Array, "B N"]
    ref_logps: Float[Array, "B N"] | None
    edges: Edges
    unvisited: Int[Array, " B"]
    gumbel: Float[Array, "B A"]

    def view(self, node: Int[Array, " B"]) -> "NodeView":
        """Looks at one node a row."""
        row = jnp.arange(len(node))
        edges = jax.tree.map(lambda x: x[row, node], self.edges)
        below = jnp.where(edges.children >= 0, self.values[row[:, None], edges.children], edges.values)
        return NodeView(
            edges, edges.rewards + below, *(x[row, node] for x in (self.visits, self.values, self.raw_values))
        )

    def most_visited(self, room: int) -> tuple[Int[Array, "B T"], Int[Array, " B"], Int[Array, " B"]]:
        """Follows the edges with most visits down from the root, the likelier of equals.

        Args:
            room: Longest answer T, in tokens.

        Returns:
            (tokens, lengths, nodes): token ids, 0 after the end, shape [B, T]; how many, shape [B]; and the last node,
            shape [B]. The last token may lie behind that node, as the end of an answer has no node.
        """
        rows = len(self.parents)
        row = jnp.arange(rows)
        all_edges = jax.tree.map(jnp.asarray, self.edges)  # a copy on the host may be asked too

        def step(carry, _):
            node, going = carry
            edges = jax.tree.map(lambda x: x[row, node], all_edges)
            action = edges.visits.argmax(-1)
            going &= (edges.visits[row, action] > 0) & (edges.children[row, action] != DEAD_END)
            child = edges.children[row, action]
            token = jnp.where(going, edges.tokens[row, action], 0)
            said, inside = going, going & (child >= 0)
            return (jnp.where(inside, child, node), inside), (token, said)

        start = (jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))
        (node, _), (tokens, said) = jax.lax.scan(step, start, None, length=room)
        return tokens.T, said.sum(0).astype(jnp.int32), node


@dataclass(frozen=True)
class NodeView:
    """What a rule sees of one node a row.

    Attributes:
        edges: Its edges. Shape [B, A].
        q: Reward and value behind each edge; has meaning where there are visits. Shape [B, A].
        visits: Its visits. Shape [B].
        value: Its mean value. Shape [B].
        raw_value: Its own value. Shape [B].
    """

    edges: Edges
    q: Float[Array, "B A"]
    visits: Int[Array, " B"]
    value: Float[Array, " B"]
    raw_value: Float[Array, " B"]

    @property
    def visited(self) -> Bool[Array, "B A"]:
        """Edges that have been visited."""
        return self.edges.visits > 0


def edges_of(step: StepScores, actions: int) -> Edges:
    """Makes the edges of one new node a row.

    Args:
        step: Scores of the tokens that may follow. Shape [B, V].
        actions: How many of them become edges, A; all of a smaller vocabulary.

    Returns:
        Edges, none of them visited. Shape [B, A].
    """
    possible = (step.score > -jnp.inf) & (step.logp > -jnp.inf)
    highest, tokens = jax.lax.top_k(jnp.where(possible, step.logp, -jnp.inf), min(actions, step.logp.shape[-1]))
    valid = highest > -jnp.inf

    def pick(x: Array) -> Array:
        return jnp.where(valid, jnp.take_along_axis(x, tokens, axis=-1), 0.0)

    rewards = pick(step.score)
    # A large finite number, so that a node without any possible token has no NaN.
    priors = jax.nn.log_softmax(jnp.where(valid, highest, jnp.finfo(highest.dtype).min / 2))
    return Edges(
        tokens=tokens.astype(jnp.int32),
        valid=valid,
        priors=priors.astype(rewards.dtype),
        rewards=rewards,
        values=jnp.zeros_like(rewards) if step.value is None else pick(step.value).astype(rewards.dtype),
        logp=pick(step.logp),
        ref_logp=None if step.ref_logp is None else pick(step.ref_logp),
        children=jnp.full(tokens.shape, UNVISITED, jnp.int32),
        visits=jnp.zeros(tokens.shape, jnp.int32),
    )


def puct(node: NodeView, *, pb_c_init: ScalarLike, pb_c_base: ScalarLike) -> Int[Array, " B"]:
    """Chooses edges by value and by prior over visits; of equals, the likeliest token.

    Args:
        node: One node a row.
        pb_c_init: Weight of the prior.
        pb_c_base: Visits at which that weight begins to grow.

    Returns:
        The edge. Shape [B].
    """
    value = node.value[:, None]
    safe = jnp.where(node.visited, node.q, value)
    low, high = jnp.minimum(value, safe.min(-1, keepdims=True)), jnp.maximum(value, safe.max(-1, keepdims=True))
    q = (jnp.where(node.visited, node.q, low) - low) / jnp.maximum(high - low, EPSILON)
    visits = node.visits.astype(q.dtype)[:, None]
    weight = pb_c_init + jnp.log((visits + pb_c_base + 1) / pb_c_base)
    explore = jnp.sqrt(visits) * weight * jax.nn.softmax(node.edges.priors) / (node.edges.visits + 1)
    return _best(q + explore, node.edges.valid)


def gumbel_root(
    node: NodeView,
    gumbel: Float[Array, "B A"],
    schedule: Int[Array, "M N"],
    *,
    value_scale: ScalarLike,
    visit_init: ScalarLike,
) -> Int[Array, " B"]:
    """Chooses edges of the root by sequential halving: some of them get equal visits, then the better half, and so on.

    Args:
        node: The root of each row.
        gumbel: Noise that makes the first choice a sample without replacement; 0 for the likeliest. Shape [B, A].
        schedule: Row m: visits that an edge under consideration has, at each simulation, if m edges are considered.
        value_scale: See `gumbel_interior`.
        visit_init: See `gumbel_interior`.

    Returns:
        The edge. Shape [B].
    """
    edges = node.edges
    considered = jnp.minimum(edges.valid.sum(-1), len(schedule) - 1)
    now = jnp.minimum(edges.visits.sum(-1), schedule.shape[1] - 1)
    logits = edges.priors - edges.priors.max(-1, keepdims=True)
    merit = jnp.maximum(gumbel + logits + _completed(node, value_scale, visit_init), -1e9)
    return _best(merit, edges.valid & (edges.visits == schedule[considered, now][:, None]))


def gumbel_interior(node: NodeView, *, value_scale: ScalarLike, visit_init: ScalarLike) -> Int[Array, " B"]:
    """Chooses edges such that visits come to follow the improved policy softmax(prior + completed values).

    Args:
        node: One node a row.
        value_scale: Weight of values, and
        visit_init: how many visits are added to the most visited edge's in it: (visit_init + visits) * value_scale.

    Returns:
        The edge. Shape [B].
    """
    visits = node.edges.visits
    improved = jax.nn.softmax(node.edges.priors + _completed(node, value_scale, visit_init))
    return _best(improved - visits / (1 + visits.sum(-1, keepdims=True)).astype(improved.dtype), node.edges.valid)


def halving_schedule(considered: int, simulations: int) -> tuple[int, ...]:
    """Visits that an edge under consideration has at each simulation.

    Args:
        considered: Edges at the beginning.
        simulations: Simulations in all.
    """
    if considered <= 1:
        return tuple(range(simulations))
    rounds = math.ceil(math.log2(considered))
    schedule: list[int] = []
    visits = 0
    while len(schedule) < simulations:
        for _ in range(max(1, simulations // (rounds * considered))):
            schedule += [visits] * considered
            visits += 1
        considered = max(2, considered // 2)
    return tuple(schedule[:simulations])


def _completed(node: NodeView, value_scale: ScalarLike, visit_init: ScalarLike) -> Float[Array, "B A"]:
    """Values of edges, stretched to [0, 1] and scaled; unvisited ones get a mean of raw value and visited ones."""
    edges, q = node.edges, node.q
    probs = jnp.maximum(jax.nn.softmax(edges.priors), jnp.finfo(q.dtype).tiny)
    probs = jnp.where(node.visited, probs, 0.0)
    share = probs / jnp.where(node.visited, probs.sum(-1, keepdims=True), 1.0)
    mean = jnp.where(node.visited, share * q, 0.0).sum(-1)
    visits = edges.visits.sum(-1).astype(q.dtype)
    mixed = (node.raw_value + visits * mean) / (visits + 1)
    q = jnp.where(node.visited, q, mixed[:, None])
    # Edges that do not exist have no say in the range.
    low = jnp.where(edges.valid, q, jnp.inf).min(-1, keepdims=True)
    high = jnp.where(edges.valid, q, -jnp.inf).max(-1, keepdims=True)
    q = jnp.where(edges.valid, (q - low) / jnp.maximum(high - low, EPSILON), 0.0)
    return (visit_init + edges.visits.max(-1, keepdims=True)).astype(q.dtype) * value_scale * q


def _best(merit: Float[Array, "B A"], allowed: Bool[Array, "B A"]) -> Int[Array, " B"]:
    return jnp.where(allowed, merit, -jnp.inf).argmax(-1).astype(jnp.int32)
