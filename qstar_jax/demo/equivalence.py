"""Is search for reward the same as search for likelihood? Measured on random token MDPs, where all optima are known.

With token rewards r + beta * log pi_ref and leaf values V*, every path's sum is beta * log pi* plus the constant
V*(s_0) (Eq. 13). So beams are the same, response for response, and search trees, node for node; a node's value differs
by V* of its state. Leave out one part of that objective, or divide sums by lengths, and they are not.

    python -m qstar_jax.demo.equivalence --mdps 200

prints how often they agree, and exits with 1 if that is not what theory says.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from qstar_jax import mdp, tabular
from qstar_jax.decoding.objectives import Likelihood, Objective, RegularisedReward, StepScores, TableReward
from qstar_jax.decoding.policies import Ensemble, Logits
from qstar_jax.decoding.responses import Responses
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.decoding.search.mcts import mcts
from qstar_jax.decoding.search.mcts_options import MctsOptions
from qstar_jax.decoding.search.tree import Tree
from qstar_jax.decoding.token_tree import TreePolicy

TOLERANCE = 1e-10  # of sums of float64, in reward
LENGTH_PENALTY = 1.0


@dataclass(frozen=True)
class Problems:
    """B token MDPs on one tree, and what is optimal in them; float64.

    Attributes:
        tree: The tree.
        beta: Temperature: reward per nat.
        rewards: r(s, a). Shape [B, S, V].
        ref_logp: log pi_ref(a | s), in nats. Shape [B, S, V].
        log_policy: log pi*(a | s), in nats. Shape [B, S, V].
        values: V*(s). Shape [B, S].
    """

    tree: tabular.TokenTree
    beta: float
    rewards: Float[Array, "B S V"]
    ref_logp: Float[Array, "B S V"]
    log_policy: Float[Array, "B S V"]
    values: Float[Array, "B S"]

    @property
    def next_values(self) -> Float[Array, "B S V"]:
        """V* of where each token leads; 0 behind an end."""
        return jnp.pad(self.values, ((0, 0), (0, 1)))[:, self.tree.children]


@dataclass(frozen=True)
class Comparison:
    """How often a search under some objective does what the same search for likelihood does.

    Attributes:
        search: The search.
        objective: The objective.
        agree: MDPs in which all responses, or all nodes of the trees, are the same.
        total: All MDPs.
        equal: Whether theory says that they agree in all.
        error: Largest difference between found and predicted constants, in reward; None where none is predicted.
    """

    search: str
    objective: str
    agree: int
    total: int
    equal: bool
    error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether this is what theory says: agreement everywhere and the right constants, or not everywhere."""
        if not self.equal:
            return self.agree < self.total
        return self.agree == self.total and (self.error is None or self.error <= TOLERANCE)


@dataclass(frozen=True)
class WithPolicy:
    """An objective of tables, beside the policy whose log-probabilities are reported and serve as priors.

    Attributes:
        objective: Reads all members of the ensemble but the first, which is the policy.
        comparable_across_lengths: Lets beam search divide its sums by lengths, to show what comes of it.
    """

    objective: Objective
    comparable_across_lengths: bool = False
    monotone = False

    def __call__(self, logits: Logits) -> StepScores:
        """See `objectives.Objective`."""
        policy, *tables = logits
        return replace(self.objective(tuple(tables)), logp=jax.nn.log_softmax(policy))


@dataclass(frozen=True)
class _Variant:
    """Tables of `TableReward` (rewards, log pi_ref, V), the value of the root, and whether theory says "equal"."""

    tables: tuple[Array, Array, Array]
    root: Array
    equal: bool


def random_problems(count: int, *, vocabulary: int = 4, depth: int = 4, beta: float = 0.5, seed: int = 0) -> Problems:
    """Draws MDPs whose last token is EOS, and solves them. Call it with float64 enabled.

    Only the ratio of rewards to beta matters, so it is the size of rewards that is drawn: standard deviations from 0.3
    to 3.

    Args:
        count: How many, B.
        vocabulary: V, in tokens.
        depth: T, the longest response, in tokens.
        beta: Temperature: reward per nat.
        seed: Of everything that is drawn.
    """
    tree = tabular.TokenTree(vocabulary, depth, eos=vocabulary - 1)
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(np.log(0.3), np.log(3.0), (count, 1, 1)))
    rewards = jnp.asarray(scale * rng.standard_normal((count, *tree.shape)))
    ref_logp = jax.nn.log_softmax(jnp.asarray(rng.standard_normal((count, *tree.shape))))

    @jax.jit
    @jax.vmap
    def solve(rewards, ref_logp):
        solution = tabular.soft_value_iteration(tree, rewards, ref_logp, beta=beta)
        return solution.log_policy, solution.v

    return Problems(tree, beta, rewards, ref_logp, *solve(rewards, ref_logp))


def compare_beams(problems: Problems, beams: int) -> list[Comparison]:
    """Compares beam searches: all their responses, in order.

    Returns:
        The whole objective, its parts, and the whole one with a length penalty.
    """
    likelihood = _beams(problems, beams, None)
    search = f"{beams} beam{'s' if beams > 1 else ''}"
    rows = []
    for name, variant in _variants(problems):
        found = _beams(problems, beams, variant)
        error = None
        if variant.equal:
            shift = found.score - problems.beta * likelihood.score
            error = _largest(shift - np.asarray(variant.root)[:, None], found.finish > 0)
        rows.append(_comparison(search, name, _same_answers(likelihood, found), variant.equal, error))
    name, whole = next(_variants(problems))
    both = [_beams(problems, beams, variant, LENGTH_PENALTY) for variant in (None, whole)]
    return [*rows, _comparison(search, f"{name}, over lengths", _same_answers(*both), False)]


def compare_trees(problems: Problems, policy: Literal["puct", "gumbel"], simulations: int) -> list[Comparison]:
    """Compares tree searches: all nodes, visits and responses.

    Returns:
        The whole objective, its parts, and implicit reward with its price, which is another way to write beta * log pi.
    """
    zeros = jnp.zeros_like(problems.rewards)
    beta_log_pi = _Variant((problems.beta * problems.log_policy, zeros, zeros), zeros[:, 0, 0], True)
    likelihood = _trees(problems, policy, simulations, beta_log_pi)
    variants = [*_variants(problems), ("beta log(pi/pi_ref) + beta log pi_ref", None)]
    rows = []
    for name, variant in variants:
        answers, tree = _trees(problems, policy, simulations, variant)
        same = _same_trees(likelihood[1], tree) & _same_answers(likelihood[0], answers)
        equal, error = variant is None or variant.equal, None
        if equal:
            predicted = 0.0 if variant is None else _values_of_nodes(problems, tree)
            error = _largest(tree.node_values - likelihood[1].node_values - predicted, tree.node_visits > 0)
        rows.append(_comparison(policy, name, same, equal, error))
    return rows


def compare(problems: Problems, *, beams: Sequence[int] = (1, 2, 4, 8), simulations: int = 64) -> list[Comparison]:
    """Makes all comparisons."""
    rows = [row for width in beams for row in compare_beams(problems, width)]
    return rows + [row for policy in ("puct", "gumbel") for row in compare_trees(problems, policy, simulations)]


def _variants(problems: Problems) -> Iterator[tuple[str, _Variant]]:
    """The whole objective first; then what is left when a part of it is missing."""
    r, ref_logp, values = problems.rewards, problems.ref_logp, problems.next_values
    root, zeros = problems.values[:, 0], jnp.zeros_like(r)
    implicit = mdp.implicit_rewards(problems.log_policy, ref_logp, beta=problems.beta)
    yield "r + beta log pi_ref, V*", _Variant((r, ref_logp, values), root, True)
    yield "r + beta log pi_ref, V = 0", _Variant((r, ref_logp, zeros), zeros[:, 0, 0], False)
    yield "r, V*", _Variant((r, zeros, values), root, False)
    yield "beta log(pi/pi_ref)", _Variant((implicit, zeros, zeros), zeros[:, 0, 0], False)


def _prompts(problems: Problems) -> tuple[Array, Array]:
    rows = len(problems.rewards)
    return jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32)


def _guided(problems: Problems, variant: _Variant, **more) -> dict:
    policy = TreePolicy(problems.tree)
    return {
        "model": Ensemble((policy,) * 4),
        "params": (problems.log_policy, *variant.tables),
        "objective": WithPolicy(TableReward(problems.beta), **more),
    }


def _beams(problems: Problems, beams: int, variant: _Variant | None, length_penalty: float = 0.0) -> Responses:
    tree = problems.tree
    given = {"model": TreePolicy(tree), "params": problems.log_policy, "objective": Likelihood()}
    if variant is not None:
        given = _guided(problems, variant, comparable_across_lengths=bool(length_penalty))
    rule = {"length_rule": "hf", "length_penalty": length_penalty} if length_penalty else {}
    options = BeamOptions(beams, tree.depth, (tree.eos,), **rule)
    prompts, prompt_lengths = _prompts(problems)
    return jax.device_get(beam_search(prompts=prompts, prompt_lengths=prompt_lengths, options=options, **given))


def _trees(
    problems: Problems, policy: Literal["puct", "gumbel"], simulations: int, variant: _Variant | None
) -> tuple[Responses, Tree]:
    """Without a variant: by implicit reward and its price, from the policies' own log-probabilities."""
    tree = problems.tree
    if variant is not None:
        given = _guided(problems, variant) | {"root_values": variant.root}
    else:
        model = Ensemble((TreePolicy(tree),) * 2)
        given = {"model": model, "params": (problems.log_policy, problems.ref_logp)}
        given["objective"] = RegularisedReward(problems.beta)
    noise = {"gumbel_scale": 0.0} if policy == "gumbel" else {}
    options = MctsOptions(tree.depth, (tree.eos,), simulations, tree.vocabulary, policy, **noise)
    prompts, prompt_lengths = _prompts(problems)
    return jax.device_get(mcts(prompts=prompts, prompt_lengths=prompt_lengths, options=options, **given))


def _comparison(search: str, name: str, same: np.ndarray, equal: bool, error: float | None = None) -> Comparison:
    return Comparison(search, name, int(same.sum()), len(same), equal, error)


def _rows_equal(*pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return np.all([(a == b).reshape(len(a), -1).all(-1) for a, b in pairs], axis=0)


def _same_answers(one: Responses, other: Responses) -> np.ndarray:
    return _rows_equal((one.tokens, other.tokens), (one.finish, other.finish), (one.lengths, other.lengths))


def _same_trees(one: Tree, other: Tree) -> np.ndarray:
    names = ("parents", "action_from_parent", "node_visits")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    pairs += [(getattr(one.children, name), getattr(other.children, name)) for name in ("tokens", "index", "visits")]
    return _rows_equal(*pairs)


def _values_of_nodes(problems: Problems, tree: Tree) -> np.ndarray:
    """V* of the state of every node [B, N]."""
    states = np.zeros(tree.parents.shape, int)
    for t in range(problems.tree.depth):
        next_states = problems.tree.children[states, tree.prefixes.tokens[..., t]]
        states = np.where(t < tree.prefixes.lengths, next_states, states)
    return np.asarray(problems.values)[np.arange(len(states))[:, None], states]


def _largest(difference: np.ndarray, where: np.ndarray) -> float:
    return float(np.abs(difference[where]).max())


def as_table(rows: Sequence[Comparison]) -> Table:
    """What `main` prints."""
    table = Table(title="the same as the search for beta log pi?")
    for title in ("search", "objective", "same", "off by", "predicted"):
        table.add_column(title, no_wrap=title != "objective")
    for row in rows:
        error = "" if row.error is None else f"{row.error:.0e}"
        verdict = ("all" if row.equal else "not all") + ("" if row.passed else ": NO")
        table.add_row(row.search, row.objective, f"{row.agree}/{row.total}", error, verdict)
    return table


def main(mdps: int = 200, vocabulary: int = 4, depth: int = 4, beta: float = 0.5, simulations: int = 64, seed: int = 0):
    """Compares search for reward with search for likelihood on random token MDPs.

    Args:
        mdps: How many.
        vocabulary: Tokens, EOS among them.
        depth: Longest response, in tokens.
        beta: Temperature: reward per nat.
        simulations: Of tree searches.
        seed: Of the MDPs.
    """
    with jax.enable_x64(True):
        problems = random_problems(mdps, vocabulary=vocabulary, depth=depth, beta=beta, seed=seed)
        rows = compare(problems, simulations=simulations)
    Console().print(as_table(rows))
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(auto_cli(main, as_positional=False))
