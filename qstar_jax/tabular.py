"""The token MDP small enough to print: a tree of all responses to one prompt, solved exactly.

It is the oracle against which the rest of the library is tested, and a place to check the paper's claims by hand.
States are numbered breadth-first, so tables over states and tokens are arrays [S, V] and tables over states [S]; state
0 is the prompt. Functions are pure, take a `TokenTree` as a static argument, and compute in the precision of their
inputs: wrap them in `with jax.enable_x64(True):` for float64.

Examples:
    The reward of one token, at depth two, recovered from comparisons of whole responses:

    >>> import jax, jax.numpy as jnp
    >>> from qstar_jax import tabular
    >>> tree = tabular.TokenTree(vocabulary=2, depth=2)
    >>> tree.states
    ((), (0,), (1,))
    >>> tree.paths.tokens.tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    >>> with jax.enable_x64(True):
    ...     rewards = jnp.zeros(tree.shape).at[1, 0].set(1.0)  # token 0 earns 1 after token 0
    ...     ref_logp = jnp.full(tree.shape, -jnp.log(2.0))
    ...     solution = tabular.soft_value_iteration(tree, rewards, ref_logp, beta=1.0)
    ...     labels = tabular.preference_table(tabular.path_sums(tree, rewards))
    ...     fit = tabular.fit_dpo(tree, labels, ref_logp, beta=1.0)
    ...     learned = jax.nn.log_softmax(fit.logits[-1]) - ref_logp
    >>> solution.v.round(3).tolist()
    [0.357, 0.62, 0.0]
    >>> learned.round(3).tolist()  # the advantages r + V(s') - V(s) of every token
    [[0.263, -0.357], [0.38, -0.62], [0.0, 0.0]]
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, ScalarLike

from qstar_jax import losses

MAX_EDGES = 1_000_000
State = tuple[int | None, ...]


@dataclass(frozen=True)
class Paths:
    """Every complete response of a tree, in lexical order; numpy arrays.

    Attributes:
        tokens: Tokens, 0 after the end. Shape [N, T].
        states: State in which each token is chosen, 0 after the end. Shape [N, T].
        mask: True at tokens of the response, the environment's included. Shape [N, T].
        actions: True at the tokens that the policy chose. Shape [N, T].
    """

    tokens: np.ndarray
    states: np.ndarray
    mask: np.ndarray
    actions: np.ndarray


@dataclass(frozen=True)
class TokenTree:
    """All responses of at most `depth` tokens to one prompt; those that end early end with `eos`.

    A response of `depth` tokens is complete too: the horizon ends the MDP, with value 0 after it. With an
    `environment` a response is a dialogue: at some positions another speaks, and its states are chance nodes. Tables
    of log pi_ref hold log P(o | s) of its replies there.

    Where states are `markov`, branches meet: denoising on a grid (Appendix B) is such a tree, whose token 0 is
    the noise x_T, drawn by the environment, and whose actions are x_{T-1}, ..., x_0.

    Attributes:
        vocabulary: V, the number of tokens.
        depth: T, the longest response, in tokens.
        eos: Token that ends a response; None if all responses have `depth` tokens.
        environment: Positions, counted from 0, whose tokens are replies of the environment and no actions.
        markov: True where a state is the last token and its position, and not all tokens so far; the others are None.

    Raises:
        ValueError: If a number is out of range, or the tree has more than a million edges.
    """

    vocabulary: int
    depth: int
    eos: int | None = None
    environment: tuple[int, ...] = ()
    markov: bool = False

    def __post_init__(self):
        """Checks the numbers before anything is enumerated."""
        if self.vocabulary < 1 or self.depth < 1:
            raise ValueError(f"vocabulary {self.vocabulary} and depth {self.depth} must be at least 1")
        if self.eos is not None and not 0 <= self.eos < self.vocabulary:
            raise ValueError(f"eos {self.eos} is no token of a vocabulary of {self.vocabulary}")
        if not set(self.environment) <= set(range(self.depth)):
            raise ValueError(f"environment {self.environment}: positions lie between 0 and {self.depth - 1}")
        if (edges := self._edges(self.markov)) > MAX_EDGES:
            raise ValueError(f"a tree of {edges} edges is too large to solve as a table; at most {MAX_EDGES}")

    def _edges(self, merged: bool) -> int:
        """Counts tokens in states, with or without branches that meet."""
        branches = self.vocabulary - (self.eos is not None)
        return self.vocabulary * sum(branches ** (min(level, 1) if merged else level) for level in range(self.depth))

    def _state(self, tokens: State) -> State:
        """The state to which tokens lead: what it remembers of them."""
        return (None,) * (len(tokens) - 1) + tokens[-1:] if self.markov else tokens

    @cached_property
    def states(self) -> tuple[State, ...]:
        """The tokens that lead to each non-terminal state, breadth-first."""
        levels = [[()]]
        tokens = [token for token in range(self.vocabulary) if token != self.eos]
        for _ in range(self.depth - 1):
            # Branches that meet are listed once.
            levels.append(list(dict.fromkeys(self._state((*state, token)) for state in levels[-1] for token in tokens)))
        return tuple(state for level in levels for state in level)

    @property
    def shape(self) -> tuple[int, int]:
        """(S, V), the shape of a table over states and tokens."""
        return len(self.states), self.vocabulary

    @cached_property
    def children(self) -> np.ndarray:
        """State to which each token leads, S where it is terminal. Shape [S, V], integers."""
        index = {state: i for i, state in enumerate(self.states)}
        terminal = len(self.states)
        # EOS and the tokens of the last level lead to terminal states.
        return np.array(
            [
                [index.get(self._state((*state, token)), terminal) for token in range(self.vocabulary)]
                for state in self.states
            ]
        )

    @cached_property
    def acts(self) -> np.ndarray:
        """Whether the policy chooses the token of a state, and not the environment. Shape [S]."""
        return np.array([len(state) not in self.environment for state in self.states])

    @cached_property
    def levels(self) -> tuple[slice, ...]:
        """The states of each depth: consecutive numbers, from the root down."""
        depths = np.array([len(state) for state in self.states])
        bounds = np.searchsorted(depths, np.arange(self.depth + 1))
        return tuple(slice(int(a), int(b)) for a, b in pairwise(bounds))

    @cached_property
    def paths(self) -> Paths:
        """Every complete response; ValueError where branches meet and there are too many."""
        if (edges := self._edges(False)) > MAX_EDGES:
            raise ValueError(f"responses of {edges} tokens are too many to list; at most {MAX_EDGES}")
        index, ends, prefixes = {state: i for i, state in enumerate(self.states)}, [], [()]
        for length in range(1, self.depth + 1):
            paths = [(*prefix, token) for prefix in prefixes for token in range(self.vocabulary)]
            prefixes = [path for path in paths if path[-1] != self.eos and length < self.depth]
            ends += [path for path in paths if path[-1] == self.eos or length == self.depth]
        ends.sort()
        tokens, states = np.zeros((2, len(ends), self.depth), np.int32)
        mask = np.zeros((len(ends), self.depth), bool)
        for n, path in enumerate(ends):
            tokens[n, : len(path)], mask[n, : len(path)] = path, True
            states[n, : len(path)] = [index[self._state(path[:t])] for t in range(len(path))]
        return Paths(tokens, states, mask, mask & self.acts[states])

    @cached_property
    def _shaping(self) -> np.ndarray:
        """Matrix D [S * V, S] with (D Phi)(s, a) = Phi(s') - Phi(s), Phi 0 in terminal states."""
        states, tokens = self.shape
        matrix = np.zeros((states, tokens, states + 1))
        s, a = np.indices(self.shape)
        matrix[s, a, s] -= 1.0
        matrix[s, a, self.children] += 1.0
        return matrix[..., :-1].reshape(states * tokens, states)

    @cached_property
    def _potential_of(self) -> np.ndarray:
        """Pseudo-inverse of `_shaping` [S, S * V]; its rank is full, since the end of every path is fixed."""
        return np.linalg.pinv(self._shaping)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SoftSolution:
    """The optimum of the KL-regularised (maximum-entropy) problem of Eq. 2.

    Attributes:
        q: Q*(s, a) in the paper's convention; r + V*(s') of a reply of the environment. Shape [S, V].
        v: V*(s); the mean of Q* over replies where the environment speaks. Shape [S].
        log_policy: log pi*(a | s) = (Q* - V*) / beta, in nats; the environment's own log P where it speaks.
            Shape [S, V].
    """

    q: Float[Array, "S V"]
    v: Float[Array, " S"]
    log_policy: Float[Array, "S V"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DpoFit:
    """The policy that DPO learned, step by step; entry 0 is the start.

    Attributes:
        losses: Population loss, in nats. Shape [K].
        logits: Logits of the policy. Shape [K, S, V].
    """

    losses: Float[Array, " K"]
    logits: Float[Array, "K S V"]


def soft_value_iteration(
    tree: TokenTree, rewards: Float[Array, "S V"], ref_logp: Float[Array, "S V"], *, beta: ScalarLike
) -> SoftSolution:
    """Solves the MDP exactly, from the leaves to the root (Eq. 5, 6 and 7).

    Args:
        tree: The tree.
        rewards: r(s, a). Shape [S, V].
        ref_logp: log pi_ref(a | s), and log P(o | s) where the environment speaks, in nats. Shape [S, V].
        beta: Temperature: reward per nat.

    Returns:
        Q*, V* and the optimal policy.
    """
    acts = tree.acts[:, None]
    bonus = jnp.where(acts, rewards + beta * ref_logp, rewards)
    values = jnp.zeros(tree.shape[0] + 1, bonus.dtype)  # the last entry is that of terminal states
    for level in reversed(tree.levels):
        q = bonus[level] + values[tree.children[level]]
        if tree.acts[level.start]:
            value = beta * jax.nn.logsumexp(q / beta, axis=-1)
        else:  # the environment has no preferences
            value = (jnp.exp(ref_logp[level]) * q).sum(-1)
        values = values.at[level].set(value)
    q = bonus + values[tree.children]
    return SoftSolution(q=q, v=values[:-1], log_policy=jnp.where(acts, (q - values[:-1, None]) / beta, ref_logp))


def on_paths(tree: TokenTree, table: Float[Array, "S V"]) -> Float[Array, "N T"]:
    """Reads a table over states and tokens along every response; 0 after the end.

    Args:
        tree: The tree.
        table: r, Q, log pi, ... Shape [S, V].

    Returns:
        Its entries along the responses, to be read with `tree.paths.mask`. Shape [N, T].
    """
    paths = tree.paths
    return jnp.where(paths.mask, table[paths.states, paths.tokens], 0.0)


def path_sums(tree: TokenTree, table: Float[Array, "S V"]) -> Float[Array, " N"]:
    """Sums a table along every response: returns of rewards, log-probabilities of a log-policy.

    Args:
        tree: The tree.
        table: r or log pi. Shape [S, V].

    Returns:
        One number per response. Shape [N].
    """
    return on_paths(tree, table).sum(-1)


def preference_table(returns: Float[Array, " N"]) -> Float[Array, "N N"]:
    """Exact Bradley-Terry labels: entry (i, j) is the probability that response i is preferred to j (Eq. 1).

    Args:
        returns: Return of each response. Shape [N].

    Returns:
        Probabilities. Shape [N, N].
    """
    return jax.nn.sigmoid(returns[:, None] - returns[None, :])


def population_dpo_loss(
    tree: TokenTree,
    logits: Float[Array, "S V"],
    preferences: Float[Array, "N N"],
    ref_logp: Float[Array, "S V"],
    *,
    beta: ScalarLike,
) -> Float[Array, ""]:
    """DPO's expected loss over all pairs of different responses, under their exact label probabilities.

    Only actions count. For a learner that takes the environment's replies for actions, pass a tree without
    `environment`.

    Args:
        tree: The tree.
        logits: Logits of the policy. Shape [S, V].
        preferences: Entry (i, j) is the probability that i is preferred to j, times how often the two are compared
            (0 for dialogues that never occur). Shape [N, N].
        ref_logp: log pi_ref(a | s), in nats. Shape [S, V].
        beta: Temperature: reward per nat.

    Returns:
        Mean loss, in nats. A scalar.
    """
    ratios = path_sums(tree, jnp.where(tree.acts[:, None], jax.nn.log_softmax(logits) - ref_logp, 0.0))
    chosen, rejected = jnp.broadcast_arrays(ratios[:, None], ratios[None, :])
    pairs = jnp.stack([chosen, rejected], axis=-1)[..., None]  # the sum of each response as its only token
    loss, _ = losses.sigmoid(pairs, jnp.ones(pairs.shape, bool), beta=beta)
    weights = jnp.where(np.eye(len(ratios), dtype=bool), 0.0, preferences)
    return (weights * loss).sum() / jnp.maximum(weights.sum(), jnp.finfo(loss.dtype).tiny)


def fit_dpo(
    tree: TokenTree,
    preferences: Float[Array, "N N"],
    ref_logp: Float[Array, "S V"],
    *,
    beta: ScalarLike,
    steps: int = 200,
) -> DpoFit:
    """Trains a tabular policy by DPO on the population loss with L-BFGS, starting from its reference.

    The labels compare whole responses and say nothing about single tokens.

    Args:
        tree: The tree.
        preferences: Entry (i, j) is the probability that i is preferred to j (`preference_table`). Shape [N, N].
        ref_logp: log pi_ref(a | s), in nats: the reference, and the first policy. Shape [S, V].
        beta: Temperature: reward per nat.
        steps: Steps of L-BFGS; after convergence they change nothing.

    Returns:
        Losses and logits before each step and after the last; K = steps + 1.
    """

    def loss_fn(logits):
        return population_dpo_loss(tree, logits, preferences, ref_logp, beta=beta)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss_fn)

    def step(carry, _):
        logits, state = carry
        value, grad = value_and_grad(logits, state=state)
        updates, state = optimizer.update(grad, state, logits, value=value, grad=grad, value_fn=loss_fn)
        # A gradient that is only rounding error would mislead the line search.
        moving = optax.tree.norm(grad) > 100 * jnp.finfo(grad.dtype).eps
        updates = jnp.where(moving, updates, 0.0)
        return (optax.apply_updates(logits, updates), state), logits

    start = jnp.where(tree.acts[:, None], ref_logp, 0.0)  # replies that never occur have no finite logit
    (last, _), logits = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    logits = jnp.concatenate([logits, last[None]])
    return DpoFit(losses=jax.lax.map(loss_fn, logits), logits=logits)


def best_potential(tree: TokenTree, difference: Float[Array, "S V"]) -> tuple[Float[Array, " S"], Float[Array, "S V"]]:
    """The potential that best explains the difference of two rewards, and the residual.

    Least squares of r' - r by Phi(s') - Phi(s) over all states and tokens, with Phi 0 in terminal states.

    Args:
        tree: The tree.
        difference: r' - r. Shape [S, V].

    Returns:
        (Phi, residual), shapes [S] and [S, V]. The residual is 0 if and only if the rewards are equivalent
        (Definition 1).
    """
    inverse, shaping = (jnp.asarray(x, difference.dtype) for x in (tree._potential_of, tree._shaping))
    potential = inverse @ difference.reshape(-1)
    return potential, difference - (shaping @ potential).reshape(difference.shape)
