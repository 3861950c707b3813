"""One step of beam search: which extensions of the live beams live on, which end as answers, and what is given up."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.objectives import StepScores
from qstar_jax.decoding.responses import Finish
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.decoding.stop_strings import StopStrings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beams:
    """K answers a prompt, the best first; unfinished ones, or ended ones.

    Attributes:
        tokens: New tokens. Shape [B, K, T].
        length: How many. Shape [B, K].
        key: What they are compared by. Shape [B, K].
        score: The objective's sum. Shape [B, K].
        logp: Sum of log pi. Shape [B, K].
        ref_logp: Sum of log pi_ref, or 0. Shape [B, K].
        valid: Whether there is such an answer. Shape [B, K].
        finish: `Finish` of ended ones. Shape [B, K].
        stop: State of each stop string. Shape [B, K, stop strings].
    """

    tokens: Int[Array, "B K T"]
    length: Int[Array, "B K"]
    key: Float[Array, "B K"]
    score: Float[Array, "B K"]
    logp: Float[Array, "B K"]
    ref_logp: Float[Array, "B K"]
    valid: Bool[Array, "B K"]
    finish: Int[Array, "B K"]
    stop: Int[Array, "B K N"]

    @classmethod
    def empty(cls, rows: int, beams: int, room: int, stops: int, dtype) -> "Beams":
        """Places for answers of at most `room` tokens, none of them taken."""
        zeros, none = jnp.zeros((rows, beams), dtype), jnp.zeros((rows, beams), jnp.int32)
        tokens = jnp.zeros((rows, beams, room), jnp.int32)
        void = jnp.full((rows, beams), -jnp.inf, dtype)
        stop = jnp.zeros((rows, beams, stops), jnp.int32)
        return cls(tokens, none, void, zeros, zeros, zeros, none > 0, none, stop)

    def take(self, index: Int[Array, "B N"]) -> "Beams":
        """Those at `index` of each row."""

        def pick(x: Array) -> Array:
            return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

        return jax.tree.map(pick, self)

    def best(self, count: int) -> "Beams":
        """The `count` of highest key, best first."""
        return self.take(jax.lax.top_k(self.key, count)[1])

    def joined(self, *others: "Beams") -> "Beams":
        """These, then the others."""
        return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), self, *others)

    def void_where(self, rows: Bool[Array, "B K"]) -> "Beams":
        """Takes answers out."""
        return replace(self, key=jnp.where(rows, -jnp.inf, self.key), valid=self.valid & ~rows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Every extension of every beam: what it is chosen by, what answers are compared by, and its sums [B, K, V]."""

    rank: Float[Array, "B K V"]
    key: Float[Array, "B K V"]
    score: Float[Array, "B K V"]
    logp: Float[Array, "B K V"]
    ref_logp: Float[Array, "B K V"] | None


def extensions(live: Beams, token_scores: Array, step: StepScores, options: BeamOptions, noise: Array) -> Candidates:
    """Extends every live beam by every token; impossible ones, and those of places without a beam, are at -inf."""
    score = live.score[..., None] + token_scores
    key = score if step.value is None else score + step.value
    if options.stochastic:
        key = _perturbed(score, live.key, noise)
    possible = live.valid[..., None] & (token_scores > -jnp.inf)
    key = jnp.where(possible, key, -jnp.inf)
    return Candidates(key, key, score, step.logp, step.ref_logp)


def _perturbed(score: Float[Array, "B K V"], parent: Float[Array, "B K"], noise: Array) -> Float[Array, "B K V"]:
    """Gumbel noise on each sum of log pi, such that the highest child of a beam has its parent's value exactly."""
    free = score + jax.random.gumbel(noise, score.shape, score.dtype)
    gap = free.max(-1, keepdims=True) - free  # 0 at the highest, else positive
    v = parent[..., None] - free + jnp.log1p(-jnp.exp(-gap))
    key = parent[..., None] - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(gap == 0, parent[..., None], key)


def select(
    live: Beams,
    ended: Beams,
    closed: Bool[Array, " B"],
    candidates: Candidates,
    t: Array,
    prompt_lengths: Array,
    options: BeamOptions,
    stop_strings: StopStrings | None,
) -> tuple[Beams, Beams, Int[Array, "B K"], Float[Array, " B"]]:
    """Of one group: new live beams, ended ones, the live ones' parents, and the best key that was given up."""
    rows, width, vocabulary = candidates.rank.shape
    eos = jnp.array(sorted({token for token in options.eos_ids if token < vocabulary}), jnp.int32)
    going = candidates.rank.at[..., eos].set(-jnp.inf) if eos.size else candidates.rank
    if stop_strings is not None:
        completes = stop_strings.completes(live.stop)
        stopping = jnp.where(completes, going, -jnp.inf)
        going = jnp.where(completes, -jnp.inf, going)
    wanted = 2 * width if options.eos_rule == "t5x" else width + 1
    going = _top(going, wanted)
    ends = [Ranked(candidates.rank[..., eos].reshape(rows, -1), _flat(width, vocabulary, eos, rows), Finish.EOS)]
    if stop_strings is not None:
        ends.append(replace(_top(stopping, width), finish=Finish.STOP))
    ends = [end for end in ends if end.key.shape[1]]

    def extended(chosen: "Ranked", finish: int) -> Beams:
        parent, token = chosen.flat // vocabulary, chosen.flat % vocabulary
        new = live.take(parent)
        at = jnp.arange(rows)[:, None], parent, token
        ref_logp = 0.0 if candidates.ref_logp is None else candidates.ref_logp[at]
        valid = chosen.key > -jnp.inf
        return replace(
            new,
            tokens=new.tokens.at[:, :, t].set(token.astype(jnp.int32)),
            length=jnp.full_like(new.length, t + 1),
            key=jnp.where(valid, candidates.key[at], -jnp.inf),
            score=jnp.where(valid, candidates.score[at], 0.0),
            logp=jnp.where(valid, new.logp + candidates.logp[at], 0.0),
            ref_logp=jnp.where(valid, new.ref_logp + ref_logp, 0.0),
            valid=valid,
            finish=jnp.full_like(new.finish, finish),
            stop=new.stop if stop_strings is None else stop_strings.advance(new.stop, token),
        )

    given_up = going.key[:, width] if going.key.shape[1] > width else jnp.full(rows, -jnp.inf, going.key.dtype)
    kept = Ranked(going.key[:, :width], going.flat[:, :width], going.finish)
    for end in ends:
        admitted = jnp.ones(end.key.shape, bool)
        if options.eos_rule != "all":
            limit = width if options.eos_rule == "hf" else 2 * width
            admitted = sum(end.outranked_by(other) for other in (going, *ends)) < limit
        given_up = jnp.maximum(given_up, jnp.where(admitted, -jnp.inf, end.key).max(-1))
        new = extended(end, end.finish).void_where(~admitted | closed[:, None])
        new = replace(new, key=options.normalised(new.key, t + 1, prompt_lengths))
        ended = ended.joined(new).best(width)
    return extended(kept, Finish.LENGTH), ended, kept.flat // vocabulary, given_up


@dataclass(frozen=True)
class Ranked:
    """Some candidates: their keys, their places beam * V + token, by which ties are broken, and how they would end."""

    key: Float[Array, "B N"]
    flat: Int[Array, "B N"]
    finish: int

    def outranked_by(self, other: "Ranked") -> Int[Array, "B N"]:
        """How many of the others come before each of these."""
        key, flat = self.key[:, :, None], self.flat[:, :, None]
        before = (other.key[:, None] > key) | ((other.key[:, None] == key) & (other.flat[:, None] < flat))
        return (before & (other.key[:, None] > -jnp.inf)).sum(-1)


def _flat(width: int, vocabulary: int, tokens: Array, rows: int) -> Array:
    flat = (jnp.arange(width, dtype=jnp.int32)[:, None] * vocabulary + tokens).reshape(-1)
    return jnp.broadcast_to(flat, (rows, flat.size))


def _top(key: Float[Array, "B K V"], count: int) -> Ranked:
    """The best of all beams, ties in the order of beam and token; of each beam first, which sorts far less."""
    rows, width, vocabulary = key.shape
    best, token = jax.lax.top_k(key.reshape(rows * width, vocabulary), min(count, vocabulary))
    best, token = (x.reshape(rows, -1) for x in (best, token))
    flat = jnp.arange(width, dtype=jnp.int32).repeat(min(count, vocabulary)) * vocabulary + token
    missing = max(count - best.shape[1], 0)  # fewer candidates than beams
    best = jnp.pad(best, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    best, order = jax.lax.top_k(best, count)
    return Ranked(best, jnp.take_along_axis(jnp.pad(flat, ((0, 0), (0, missing))), order, axis=1), Finish.LENGTH)


def is_done(
    live: Beams, ended: Beams, t: Array, prompt_lengths: Array, options: BeamOptions, monotone: bool
) -> Bool[Array, " B"]:
    """Whether nothing that a row still has can change its ended answers, or early stopping says so."""
    full = ended.valid.all(-1)
    done = jnp.zeros_like(full)
    if monotone or options.early_stopping != "never":  # a sum that can rise has no bound
        grows = options.early_stopping == "never" and options.length_penalty > 0
        length = options.max_new_tokens if grows else t + 1
        best = options.normalised(live.key, length, prompt_lengths).max(-1)
        done = full & ~(best > ended.key[:, -1])
    if options.early_stopping is True:
        done |= full
    return done | ~live.valid.any(-1)
