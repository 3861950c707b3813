"""Tests whether search for reward equals search for likelihood, on random token MDPs with known optima.

With token rewards r + beta * log pi_ref and leaf values V*, the sum along every path is beta * log pi* plus the
constant V*(s_0) (Eq. 13). So beams agree response by response, and search trees node by node, with node values shifted
by V* of their states. Without one part of that objective, or with sums divided by lengths, they do not.

    python -m qstar_jax.demo.equivalence --mdps 200

prints how often they agree, and exits with 1 if theory predicts otherwise.
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

TOLERANCE = 1e-10  # for sums in float64, in reward
LENGTH_PENALTY = 1.0


@dataclass(frozen=True)
class Problems:
    """B token MDPs on one tree with their solutions, in float64.

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
        """V* of the state after each token; 0 after the end."""
        return jnp.pad(self.values, ((0, 0), (0, 1)))[:, self.tree.children]


@dataclass(frozen=True)
class Comparison:
    """How often a search under some objective agrees with the same search for likelihood.

    Attributes:
        search: The search.
        objective: The objective.
        agree: Number of MDPs in which all responses, or all nodes of the trees, are equal.
        total: Number of MDPs.
        equal: Whether theory predicts agreement in all of them.
        error: Largest deviation from the predicted constants, in reward; None if none is predicted.
    """

    search: str
    objective: str
    agree: int
    total: int
    equal: bool
    error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether theory holds: agreement everywhere with the right constants, or disagreement somewhere."""
        if not self.equal:
            return self.agree < self.total
        return self.agree == self.total and (self.error is None or self.error <= TOLERANCE)


@dataclass(frozen=True)
class WithPolicy:
    """An objective over tables, with a policy whose log-probabilities are reported and serve as priors.

    Attributes:
        objective: Reads all members of the ensemble but the first, which is the policy.
        comparable_across_lengths: Lets beam search divide its sums by lengths, to show the effect.
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
    """Tables for `TableReward` (rewards, log pi_ref, V), the value of the root, and whether they should be equal."""

    tables: tuple[Array, Array, Array]
    root: Array
    equal: bool


def random_problems(count: int, *, vocabulary: int = 4, depth: int = 4, beta: float = 0.5, seed: int = 0) -> Problems:
    """Draws and solves random MDPs whose last token is EOS; call it with float64 enabled.

    Only the ratio of rewards to beta matters, so only the scale of rewards varies: standard deviations of 0.3 to 3.

    Args:
        count: Number of MDPs, B.
        vocabulary: Number of tokens, V.
        depth: Maximum number of tokens of a response, T.
        beta: Temperature: reward per nat.
        seed: Random seed.
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
    """Compares beam searches by all their responses, in order.

    Returns:
        Comparisons for the whole objective, its parts, and the whole objective with a length penalty.
    """
    likelihood = _beams(problems, beams, None)
    search = f"{beams} beam{'s' if beams > 1 else ''}"
    rows = []
    for name, variant in _variants(problems):
        # Scores should differ by the value of the root.
        responses = _beams(problems, beams, variant)
        error = None
        if variant.equal:
            shift = responses.score - problems.beta * likelihood.score
            error = _largest(shift - np.asarray(variant.root)[:, None], responses.finish > 0)
        rows.append(_comparison(search, name, _same_responses(likelihood, responses), variant.equal, error))
    name, whole = next(_variants(problems))
    both = [_beams(problems, beams, variant, LENGTH_PENALTY) for variant in (None, whole)]
    return [*rows, _comparison(search, f"{name}, over lengths", _same_responses(*both), False)]


def compare_trees(problems: Problems, policy: Literal["puct", "gumbel"], simulations: int) -> list[Comparison]:
    """Compares tree searches by all nodes, visits and responses.

    Returns:
        Comparisons for the whole objective, its parts, and the regularised reward, another form of beta * log pi.
    """
    zeros = jnp.zeros_like(problems.rewards)
    beta_log_pi = _Variant((problems.beta * problems.log_policy, zeros, zeros), zeros[:, 0, 0], True)
    likelihood = _trees(problems, policy, simulations, beta_log_pi)
    variants = [*_variants(problems), ("beta log(pi/pi_ref) + beta log pi_ref", None)]
    rows = []
    for name, variant in variants:
        responses, tree = _trees(problems, policy, simulations, variant)
        same = _same_trees(likelihood[1], tree) & _same_responses(likelihood[0], responses)
        # Node values should differ by V* of their states.
        equal, error = variant is None or variant.equal, None
        if equal:
            predicted = 0.0 if variant is None else _values_of_nodes(problems, tree)
            error = _largest(tree.node_values - likelihood[1].node_values - predicted, tree.node_visits > 0)
        rows.append(_comparison(policy, name, same, equal, error))
    return rows


def compare(problems: Problems, *, beams: Sequence[int] = (1, 2, 4, 8), simulations: int = 64) -> list[Comparison]:
    """Runs all comparisons."""
    rows = [row for width in beams for row in compare_beams(problems, width)]
    return rows + [row for policy in ("puct", "gumbel") for row in compare_trees(problems, policy, simulations)]


def _variants(problems: Problems) -> Iterator[tuple[str, _Variant]]:
    """Yields the whole objective, then variants that lack a part of it."""
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
    """Without a variant, searches by the regularised reward computed from the policies' own log-probabilities."""
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


def _same_responses(one: Responses, other: Responses) -> np.ndarray:
    return _rows_equal((one.tokens, other.tokens), (one.finish, other.finish), (one.lengths, other.lengths))


def _same_trees(one: Tree, other: Tree) -> np.ndarray:
    names = ("parents", "action_from_parent", "node_visits")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    pairs += [(getattr(one.children, name), getattr(other.children, name)) for name in ("tokens", "index", "visits")]
    return _rows_equal(*pairs)


def _values_of_nodes(problems: Problems, tree: Tree) -> np.ndarray:
    """Returns V* of the state of every node. Shape [B, N]."""
    states = np.zeros(tree.parents.shape, int)
    for t in range(problems.tree.depth):
        next_states = problems.tree.children[states, tree.prefixes.tokens[..., t]]
        states = np.where(t < tree.prefixes.lengths, next_states, states)
    return np.asarray(problems.values)[np.arange(len(states))[:, None], states]


def _largest(difference: np.ndarray, where: np.ndarray) -> float:
    return float(np.abs(difference[where]).max())


def as_table(rows: Sequence[Comparison]) -> Table:
    """Formats comparisons for the terminal."""
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
        mdps: Number of MDPs.
        vocabulary: Number of tokens, including EOS.
        depth: Maximum number of tokens of a response.
        beta: Temperature: reward per nat.
        simulations: Simulations per tree search.
        seed: Random seed of the MDPs.
    """
    with jax.enable_x64(True):
        problems = random_problems(mdps, vocabulary=vocabulary, depth=depth, beta=beta, seed=seed)
        rows = compare(problems, simulations=simulations)
    Console().print(as_table(rows))
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(auto_cli(main, as_positional=False))
