"""One step of beam search: which extensions of the live beams live on, which finish, and which are pruned."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.objectives import StepScores
from qstar_jax.decoding.partial import Partial
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.decoding.stop_strings import StopStrings


@dataclass(frozen=True)
class Candidates:
    """Every extension of every beam of a group.

    Attributes:
        rank: What they are chosen by; -inf where an extension is impossible. Shape [B, K, V].
        score: What responses are compared by. Shape [B, K, V].
        step: Scores of the tokens. Shape [B, K, V].
    """

    rank: Float[Array, "B K V"]
    score: Float[Array, "B K V"]
    step: StepScores


@dataclass(frozen=True)
class Selection:
    """What one step makes of a group of K beams.

    Attributes:
        live: The new live beams, best first. Shapes [B, K, ...].
        ended: The best finished responses so far, best first. Shapes [B, K, ...].
        parents: Beam that each live one extends. Shape [B, K].
        pruned: The best score that was pruned. Shape [B].
    """

    live: Partial
    ended: Partial
    parents: Int[Array, "B K"]
    pruned: Float[Array, " B"]


def extensions(live: Partial, step: StepScores, options: BeamOptions, noise: Array) -> Candidates:
    """Extends every live beam by every token.

    Args:
        live: Beams of a group. Shapes [B, K, ...].
        step: Scores of their next tokens. Shape [B, K, V].
        options: Whether beams are stochastic.
        noise: A `jax.random.key` for these.
    """
    total = live.total[..., None] + step.score
    score = total if step.value is None else total + step.value
    if options.stochastic:
        score = _perturbed(total, live.score, noise)
    possible = live.exists[..., None] & (step.score > -jnp.inf)
    score = jnp.where(possible, score, -jnp.inf)
    return Candidates(score, score, step)


def _perturbed(total: Float[Array, "B K V"], parent: Float[Array, "B K"], noise: Array) -> Float[Array, "B K V"]:
    """Gumbel noise on each sum of log pi, such that the highest child of a beam has exactly its parent's score."""
    free = total + jax.random.gumbel(noise, total.shape, total.dtype)
    gap = free.max(-1, keepdims=True) - free  # 0 at the highest, else positive
    v = parent[..., None] - free + jnp.log1p(-jnp.exp(-gap))
    score = parent[..., None] - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(gap == 0, parent[..., None], score)


def select(
    live: Partial,
    ended: Partial,
    closed: Bool[Array, " B"],
    candidates: Candidates,
    t: Array,
    prompt_lengths: Array,
    options: BeamOptions,
    stop_strings: StopStrings | None,
) -> Selection:
    """Chooses among the extensions of a group's beams.

    Args:
        live: Its live beams. Shapes [B, K, ...].
        ended: Its finished responses. Shapes [B, K, ...].
        closed: Whether its search is over. Shape [B].
        candidates: Extensions of its live beams. Shape [B, K, V].
        t: Tokens before this one.
        prompt_lengths: Tokens of each prompt. Shape [B].
        options: Semantics of the search.
        stop_strings: Strings that end a response.
    """
    rows, width, vocabulary = candidates.rank.shape

    def extended(chosen: Ranked) -> Partial:
        parent, token = chosen.flat // vocabulary, chosen.flat % vocabulary
        at = jnp.arange(rows)[:, None], parent, token
        exists, step = chosen.rank > -jnp.inf, jax.tree.map(lambda x: x[at], candidates.step)
        new = live.take(parent).append(token, step, exists, eos_ids=options.eos_ids, stop_strings=stop_strings)
        return replace(new, score=candidates.score[at]).without(~exists)

    # Extensions that end a response are ranked apart from those that continue one.
    continuing, ends = _split(live, candidates, options, stop_strings)
    # The K best of those that continue are the new live beams; the next one is the best that is pruned.
    kept = Ranked(continuing.rank[:, :width], continuing.flat[:, :width])
    no_score = jnp.full(rows, -jnp.inf, continuing.rank.dtype)
    pruned = continuing.rank[:, width] if continuing.rank.shape[1] > width else no_score
    # Ends that the rule admits compete with earlier ones for K places, by normalized scores.
    for end in ends:
        admitted = jnp.ones(end.rank.shape, bool)
        if options.eos_rule != "all":
            limit = width if options.eos_rule == "hf" else 2 * width
            admitted = sum(end.outranked_by(other) for other in (continuing, *ends)) < limit
        pruned = jnp.maximum(pruned, jnp.where(admitted, -jnp.inf, end.rank).max(-1))
        new = extended(end)
        new = replace(new, score=options.normalised(new.score, t + 1, prompt_lengths))
        ended = ended.joined(new.without(~admitted | closed[:, None])).best(width)
    return Selection(extended(kept), ended, kept.flat // vocabulary, pruned)


@dataclass(frozen=True)
class Ranked:
    """Some candidates: what they are chosen by, and their places beam * V + token, which break ties."""

    rank: Float[Array, "B N"]
    flat: Int[Array, "B N"]

    def outranked_by(self, other: "Ranked") -> Int[Array, "B N"]:
        """How many of the others come before each of these."""
        rank, flat = self.rank[:, :, None], self.flat[:, :, None]
        before = (other.rank[:, None] > rank) | ((other.rank[:, None] == rank) & (other.flat[:, None] < flat))
        return (before & (other.rank[:, None] > -jnp.inf)).sum(-1)


def _split(
    live: Partial, candidates: Candidates, options: BeamOptions, stop_strings: StopStrings | None
) -> tuple[Ranked, list[Ranked]]:
    """The best candidates that continue a response, one more than beams at least; and those that may end one."""
    rank, ends = candidates.rank, []
    rows, width, vocabulary = rank.shape
    eos = jnp.array(sorted({token for token in options.eos_ids if token < vocabulary}), jnp.int32)
    if eos.size:
        flat = (jnp.arange(width, dtype=jnp.int32)[:, None] * vocabulary + eos).reshape(-1)
        ends.append(Ranked(rank[..., eos].reshape(rows, -1), jnp.broadcast_to(flat, (rows, flat.size))))
        rank = rank.at[..., eos].set(-jnp.inf)
    if stop_strings is not None:
        completes = stop_strings.completes(live.stop)
        ends.append(_top(jnp.where(completes, rank, -jnp.inf), width))
        rank = jnp.where(completes, -jnp.inf, rank)
    return _top(rank, 2 * width if options.eos_rule == "t5x" else width + 1), ends


def _top(rank: Float[Array, "B K V"], count: int) -> Ranked:
    """The best of all beams, ties in the order of beam and token; of each beam first, which sorts far less."""
    rows, width, vocabulary = rank.shape
    best, token = jax.lax.top_k(rank.reshape(rows * width, vocabulary), min(count, vocabulary))
    best, token = (x.reshape(rows, -1) for x in (best, token))
    flat = jnp.arange(width, dtype=jnp.int32).repeat(min(count, vocabulary)) * vocabulary + token
    missing = max(count - best.shape[1], 0)  # fewer candidates than beams
    best = jnp.pad(best, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    best, order = jax.lax.top_k(best, count)
    return Ranked(best, jnp.take_along_axis(jnp.pad(flat, ((0, 0), (0, missing))), order, axis=1))


def is_done(
    live: Partial, ended: Partial, t: Array, prompt_lengths: Array, options: BeamOptions, monotone: bool
) -> Bool[Array, " B"]:
    """Whether no live beam can change a group's finished responses, or early stopping applies."""
    full = ended.exists.all(-1)
    done = jnp.zeros_like(full)
    if monotone or options.early_stopping != "never":  # a sum that can rise has no bound
        grows = options.early_stopping == "never" and options.length_penalty > 0
        length = options.max_new_tokens if grows else t + 1
        best = options.normalised(live.score, length, prompt_lengths).max(-1)
        done = full & ~(best > ended.score[:, -1])
    if options.early_stopping is True:
        done |= full
    return done | ~live.exists.any(-1)
