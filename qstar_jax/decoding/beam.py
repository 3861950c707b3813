"""Beam search: the K best continuations of every prompt, under any objective, in the semantics of one's choice.

One loop serves likelihood and reward-guided search, diverse and stochastic beams. Keys and values are never moved:
tokens stay in the slots in which they were made, and an ancestry table says which of them each beam goes through.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.hypotheses import Finish, Hypotheses
from qstar_jax.decoding.objectives import Likelihood, Objective, StepScores
from qstar_jax.decoding.policies import Memory, Policy
from qstar_jax.decoding.stop_strings import StopStrings

BLOCK = 8  # most steps between two looks at whether every row is done


@dataclass(frozen=True)
class BeamOptions:
    """What "beam search" means; programs differ in all of it, and the defaults here search best.

    Attributes:
        beams: Width of the search, K.
        max_new_tokens: Longest answer T, EOS included.
        eos_ids: Tokens that end an answer.
        eos_rule: Which ends of answers are kept: `all`; those among the `hf` K or `t5x` 2K best candidates of a step,
            unfinished ones counted too.
        length_rule: What a sum is divided by to compare answers: nothing; `hf`: length ** length_penalty; `gnmt`:
            ((5 + length) / 6) ** length_penalty (arXiv 1609.08144). Lengths count EOS.
        length_penalty: Exponent of the rule; above 0 favours long answers.
        count_prompt: Whether lengths count the prompt too, as T5X does.
        early_stopping: When a row is done. "never": when no unfinished answer can become better than the worst of K
            finished ones. False: when none is better at its present length. True: also when K answers are finished.
        truncated: Whether answers that run into the limit `compete` with finished ones, or are used only where a row
            has no finished one (`drop`).
        constraints: Repetition and shortest length.
        groups: Diverse beam search: beams are split into so many groups, each avoiding what earlier ones say.
        diversity: What a token costs a beam for each beam of an earlier group that says it at the same step, in nats;
            it counts for the choice alone, not in the score (arXiv 1610.02424).
        stochastic: Stochastic beam search: K answers drawn without replacement from the policy (arXiv 1903.06059); the
            score is the perturbed log-probability.
        reorder: `ancestry` leaves keys and values where they are; `gather` moves them after every step, which is
            slower and does the same.
    """

    beams: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    eos_rule: Literal["all", "hf", "t5x"] = "all"
    length_rule: Literal["none", "hf", "gnmt"] = "none"
    length_penalty: float = 0.0
    count_prompt: bool = False
    early_stopping: bool | Literal["never"] = "never"
    truncated: Literal["compete", "drop"] = "compete"
    constraints: Constraints = Constraints()
    groups: int = 1
    diversity: float = 0.0
    stochastic: bool = False
    reorder: Literal["ancestry", "gather"] = "ancestry"

    def __post_init__(self):
        """Refuses what has no meaning or would have no effect."""
        wrong = None
        if self.beams < 1 or self.max_new_tokens < 1 or self.groups < 1:
            wrong = f"beams {self.beams}, max_new_tokens {self.max_new_tokens}, groups {self.groups}: at least 1 each"
        elif self.beams % self.groups:
            wrong = f"beams {self.beams} cannot be split into {self.groups} groups of one size"
        elif (self.groups > 1) != (self.diversity > 0):
            wrong = f"groups {self.groups} with diversity {self.diversity}: set groups above 1 and diversity above 0"
        elif self.length_rule == "none" and (self.length_penalty or self.count_prompt):
            wrong = f"length_penalty {self.length_penalty} has no effect with length_rule none; choose hf or gnmt"
        elif self.stochastic and (self.groups > 1 or self.length_rule != "none"):
            wrong = "stochastic beams are a sample, which neither groups nor a length rule may change"
        elif self.constraints.min_new_tokens > self.max_new_tokens:
            wrong = f"min_new_tokens {self.constraints.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
        elif any(eos < 0 for eos in self.eos_ids):
            wrong = f"eos_ids {self.eos_ids} are token ids, from 0 on"
        if wrong:
            raise ValueError(wrong)

    def normalised(self, score: Array, length: Array | int, prompt_lengths: Int[Array, " B"]) -> Array:
        """Divides sums [B, ...] of answers of `length` new tokens as the length rule says."""
        if self.length_rule == "none":
            return score
        if self.count_prompt:
            length = length + prompt_lengths.reshape(-1, *[1] * (score.ndim - 1))
        length = jnp.asarray(length, score.dtype)
        base = length if self.length_rule == "hf" else (5 + length) / 6
        return score / base**self.length_penalty


def hf_compat(
    beams: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    *,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    constraints: Constraints = Constraints(),
) -> BeamOptions:
    """Options that do what `generate(num_beams=...)` of transformers 5 does, with its defaults."""
    return BeamOptions(
        beams,
        max_new_tokens,
        eos_ids,
        eos_rule="hf",
        length_rule="hf" if length_penalty else "none",
        length_penalty=length_penalty,
        early_stopping=early_stopping if beams > 1 else True,  # one beam is greedy decoding there: it has one end
        constraints=constraints,
    )


def t5x_compat(beams: int, max_new_tokens: int, eos_id: int, *, alpha: float = 0.6) -> BeamOptions:
    """Options that do what T5X's `beam_search` does, with its default; without its treatment of EOS in prompts."""
    return BeamOptions(
        beams,
        max_new_tokens,
        (eos_id,),
        eos_rule="t5x",
        length_rule="gnmt" if alpha else "none",
        length_penalty=alpha,
        count_prompt=bool(alpha),
        truncated="drop",
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Beams:
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
    def empty(cls, rows: int, beams: int, room: int, stops: int, dtype) -> "_Beams":
        zeros, none = jnp.zeros((rows, beams), dtype), jnp.zeros((rows, beams), jnp.int32)
        tokens = jnp.zeros((rows, beams, room), jnp.int32)
        void = jnp.full((rows, beams), -jnp.inf, dtype)
        stop = jnp.zeros((rows, beams, stops), jnp.int32)
        return cls(tokens, none, void, zeros, zeros, zeros, none > 0, none, stop)

    def take(self, index: Int[Array, "B N"]) -> "_Beams":
        def pick(x: Array) -> Array:
            return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

        return jax.tree.map(pick, self)

    def best(self, count: int) -> "_Beams":
        return self.take(jax.lax.top_k(self.key, count)[1])

    def joined(self, *others: "_Beams") -> "_Beams":
        return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), self, *others)

    def void_where(self, rows: Bool[Array, "B K"]) -> "_Beams":
        return replace(self, key=jnp.where(rows, -jnp.inf, self.key), valid=self.valid & ~rows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Search:
    """The loop's state: `live` beams with the scores of their next tokens, `ended` ones, and what has been given up."""

    live: _Beams
    ended: _Beams
    closed: Bool[Array, "B G"]
    pruned: Float[Array, " B"]
    ancestry: Int[Array, "B K T"]
    step: StepScores
    memory: Memory
    key: jax.Array


@partial(jax.jit, static_argnames=("model", "options", "objective"))
def beam_search(
    model: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    options: BeamOptions,
    *,
    objective: Objective = Likelihood(),
    stop_strings: StopStrings | None = None,
    key: jax.Array | None = None,
) -> Hypotheses:
    """Searches for the answers of highest score.

    At every step each live beam is extended by every token. Extensions that end an answer compete for K places of ended
    answers, all others for the K places of live ones. The search of a row is over as `options.early_stopping` says, and
    that of the batch when all rows are done. By default scores are unnormalised sums of log pi, which is the paper's
    search; as they can only fall, stopping then loses nothing, and the best answer may come with a proof: `certified`
    is True where everything that was ever given up had a lower score already.

    Args:
        model: A policy; an `Ensemble` where the objective reads several.
        params: Its parameters; for speed, those that `model.unstack` returns.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        options: Width, limits, and semantics.
        objective: What is added up.
        stop_strings: Strings that end an answer.
        key: A `jax.random.key` for stochastic beams.

    Returns:
        The K best answers of each prompt, best first.

    Raises:
        ValueError: If options and objective do not go together.

    References:
        arXiv 2404.12358, Eq. 12 and 13.
    """
    _check(options, objective, key)
    rows, beams, room = prompts.shape[0], options.beams, options.max_new_tokens
    logits, memory = model.prefill(params, prompts, prompt_lengths, room * beams)
    step = objective(jax.tree.map(lambda x: jnp.repeat(x[:, None], beams, axis=1), logits))
    dtype = step.score.dtype
    live = _Beams.empty(rows, beams, room, stop_strings.count if stop_strings else 0, dtype)
    # All beams of a group start from the same prompt: one of them is live, or each answer would be found many times.
    first = jnp.arange(beams) % (beams // options.groups) == 0
    live = replace(live, key=jnp.where(first, jnp.zeros_like(live.key), live.key), valid=live.valid | first)
    state = _Search(
        live=live,
        ended=_Beams.empty(rows, beams, room, live.stop.shape[-1], dtype),
        closed=jnp.zeros((rows, options.groups), bool),
        pruned=jnp.full(rows, -jnp.inf, dtype),
        ancestry=jnp.full((rows, beams, room), -1, jnp.int32),
        step=step,
        memory=memory,
        key=jax.random.key(0) if key is None else key,
    )

    choose = partial(
        _choose,
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        options=options,
        monotone=objective.monotone,
        stop_strings=stop_strings,
    )

    def advance(state: _Search, t: Array) -> tuple[_Search, None]:
        """Runs the live beams' last tokens, t - 1 of them being before these, and chooses the next ones."""
        path = (state.ancestry[..., None] == jnp.arange(beams)).reshape(rows, beams, -1)
        tokens = jax.lax.dynamic_index_in_dim(state.live.tokens, t - 1, axis=2, keepdims=False)
        logits, memory = model.extend(params, state.memory, tokens, path, (t - 1) * beams)
        return choose(replace(state, step=objective(logits), memory=memory), t), None

    def advance_block(carry):
        state, t = carry
        state, _ = jax.lax.scan(advance, state, t + jnp.arange(block))
        return state, t + block

    # No branches inside: XLA copies what passes through them, and keys and values are most of the memory. So blocks
    # must come out even, and what follows the end of the last row is harmless.
    block = max(size for size in range(1, BLOCK + 1) if (room - 1) % size == 0)
    state, _ = jax.lax.while_loop(
        lambda carry: (carry[1] < room) & ~carry[0].closed.all(),
        advance_block,
        (choose(state, jnp.int32(0)), jnp.int32(1)),
    )
    return _result(state, prompt_lengths, options, objective, has_reference=step.ref_logp is not None)


def _check(options: BeamOptions, objective: Objective, key: jax.Array | None):
    if options.length_rule != "none" and not objective.comparable_across_lengths:
        raise ValueError(
            f"length_rule {options.length_rule!r} with {type(objective).__name__}: a search for reward and one for "
            "likelihood differ by a constant, and a constant divided by lengths is none; use length_rule 'none'"
        )
    if options.stochastic and not isinstance(objective, Likelihood):
        raise ValueError(f"stochastic beams draw from a policy, so their objective is Likelihood, not {objective}")
    if options.stochastic != (key is not None):
        raise ValueError("a key is for stochastic beams, and they need one")


def _choose(
    state: _Search,
    t: Array,
    *,
    prompts: Array,
    prompt_lengths: Array,
    options: BeamOptions,
    monotone: bool,
    stop_strings: StopStrings | None,
) -> _Search:
    """One step of selection: new live and ended beams, and through which slots the live ones go."""
    live, width = state.live, options.beams // options.groups
    token_scores = options.constraints.apply(state.step.score, live.tokens, t, prompts, prompt_lengths, options.eos_ids)
    key, noise = jax.random.split(state.key)
    said = jnp.zeros((*prompts.shape[:1], 1, token_scores.shape[-1]), token_scores.dtype)
    parts, parents, pruned = [], [], state.pruned
    for g in range(options.groups):
        own = slice(g * width, (g + 1) * width)
        cut = partial(jax.tree.map, lambda x, own=own: x[:, own])
        candidates = _candidates(cut(live), token_scores[:, own], cut(state.step), options, noise)
        if g:
            candidates = replace(candidates, rank=candidates.key - options.diversity * said)
        new, ended, parent, given_up = _select(
            cut(live), cut(state.ended), state.closed[:, g], candidates, t, prompt_lengths, options, stop_strings
        )
        if options.groups > 1:
            chosen = jax.lax.dynamic_index_in_dim(new.tokens, t, axis=2, keepdims=False)
            saying = new.valid & ~state.closed[:, g, None]
            hits = jnp.where(saying[..., None], jax.nn.one_hot(chosen, said.shape[-1], dtype=said.dtype), 0)
            said = said + hits.sum(1, keepdims=True)
        closed = state.closed[:, g] | _is_done(new, ended, t, prompt_lengths, options, monotone)
        parts.append((new, ended, closed))
        parents.append(g * width + parent)
        given_up = jnp.maximum(given_up, jnp.where(closed, new.key.max(-1), -jnp.inf))
        pruned = jnp.maximum(pruned, jnp.where(state.closed[:, g], -jnp.inf, given_up))
    lives, endeds, closeds = zip(*parts, strict=True)
    ancestry, memory = _follow(state.ancestry, state.memory, jnp.concatenate(parents, axis=1), t, options)
    return replace(
        state,
        live=lives[0].joined(*lives[1:]),
        ended=endeds[0].joined(*endeds[1:]),
        closed=jnp.stack(closeds, axis=1),
        pruned=pruned,
        ancestry=ancestry,
        memory=memory,
        key=key,
    )


def _follow(
    ancestry: Int[Array, "B K T"], memory: Memory, parents: Int[Array, "B K"], t: Array, options: BeamOptions
) -> tuple[Int[Array, "B K T"], Memory]:
    """Beams go on from their parents: their slots are taken over, or, for `gather`, the contents are moved."""
    rows, beams, room = ancestry.shape
    if options.reorder == "gather":
        memory = memory.reorder((jnp.arange(room)[:, None] * beams + parents[:, None]).reshape(rows, -1))
        parents = jnp.broadcast_to(jnp.arange(beams), parents.shape)
    ancestry = jnp.take_along_axis(ancestry, parents[..., None], axis=1)
    return ancestry.at[:, :, t].set(jnp.arange(beams, dtype=jnp.int32)), memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Candidates:
    """Every extension of every beam: what it is chosen by, what answers are compared by, and its sums [B, K, V]."""

    rank: Float[Array, "B K V"]
    key: Float[Array, "B K V"]
    score: Float[Array, "B K V"]
    logp: Float[Array, "B K V"]
    ref_logp: Float[Array, "B K V"] | None


def _candidates(live: _Beams, token_scores: Array, step: StepScores, options: BeamOptions, noise: Array) -> _Candidates:
    score = live.score[..., None] + token_scores
    key = score if step.value is None else score + step.value
    if options.stochastic:
        key = _perturbed(score, live.key, noise)
    possible = live.valid[..., None] & (token_scores > -jnp.inf)
    key = jnp.where(possible, key, -jnp.inf)
    return _Candidates(key, key, score, step.logp, step.ref_logp)


def _perturbed(score: Float[Array, "B K V"], parent: Float[Array, "B K"], noise: Array) -> Float[Array, "B K V"]:
    """Gumbel noise on each sum of log pi, such that the highest child of a beam has its parent's value exactly."""
    free = score + jax.random.gumbel(noise, score.shape, score.dtype)
    gap = free.max(-1, keepdims=True) - free  # 0 at the highest, else positive
    v = parent[..., None] - free + jnp.log1p(-jnp.exp(-gap))
    key = parent[..., None] - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))
    return jnp.where(gap == 0, parent[..., None], key)


def _select(
    live: _Beams,
    ended: _Beams,
    closed: Bool[Array, " B"],
    candidates: _Candidates,
    t: Array,
    prompt_lengths: Array,
    options: BeamOptions,
    stop_strings: StopStrings | None,
) -> tuple[_Beams, _Beams, Int[Array, "B K"], Float[Array, " B"]]:
    """Of one group: new live beams, ended ones, the live ones' parents, and the best key that was given up."""
    rows, width, vocabulary = candidates.rank.shape
    eos = jnp.array(sorted(set(options.eos_ids)), jnp.int32)
    going = candidates.rank.at[..., eos].set(-jnp.inf) if eos.size else candidates.rank
    if stop_strings is not None:
        completes = stop_strings.completes(live.stop)
        stopping = jnp.where(completes, going, -jnp.inf)
        going = jnp.where(completes, -jnp.inf, going)
    wanted = 2 * width if options.eos_rule == "t5x" else width + 1
    going = _top(going, wanted)
    ends = [_Ranked(candidates.rank[..., eos].reshape(rows, -1), _flat(width, vocabulary, eos, rows), Finish.EOS)]
    if stop_strings is not None:
        ends.append(replace(_top(stopping, width), finish=Finish.STOP))
    ends = [end for end in ends if end.key.shape[1]]

    def extended(chosen: "_Ranked", finish: int) -> _Beams:
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
    kept = _Ranked(going.key[:, :width], going.flat[:, :width], going.finish)
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
class _Ranked:
    """Some candidates: their keys, their places beam * V + token, by which ties are broken, and how they would end."""

    key: Float[Array, "B N"]
    flat: Int[Array, "B N"]
    finish: int

    def outranked_by(self, other: "_Ranked") -> Int[Array, "B N"]:
        """How many of the others come before each of these."""
        key, flat = self.key[:, :, None], self.flat[:, :, None]
        before = (other.key[:, None] > key) | ((other.key[:, None] == key) & (other.flat[:, None] < flat))
        return (before & (other.key[:, None] > -jnp.inf)).sum(-1)


def _flat(width: int, vocabulary: int, tokens: Array, rows: int) -> Array:
    flat = (jnp.arange(width, dtype=jnp.int32)[:, None] * vocabulary + tokens).reshape(-1)
    return jnp.broadcast_to(flat, (rows, flat.size))


def _top(key: Float[Array, "B K V"], count: int) -> _Ranked:
    """The best of all beams, ties in the order of beam and token; of each beam first, which sorts far less."""
    rows, width, vocabulary = key.shape
    best, token = jax.lax.top_k(key.reshape(rows * width, vocabulary), min(count, vocabulary))
    best, token = (x.reshape(rows, -1) for x in (best, token))
    flat = jnp.arange(width, dtype=jnp.int32).repeat(min(count, vocabulary)) * vocabulary + token
    missing = max(count - best.shape[1], 0)  # fewer candidates than beams
    best = jnp.pad(best, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    best, order = jax.lax.top_k(best, count)
    return _Ranked(best, jnp.take_along_axis(jnp.pad(flat, ((0, 0), (0, missing))), order, axis=1), Finish.LENGTH)


def _is_done(
    live: _Beams, ended: _Beams, t: Array, prompt_lengths: Array, options: BeamOptions, monotone: bool
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


def _result(
    state: _Search, prompt_lengths: Array, options: BeamOptions, objective: Objective, has_reference: bool
) -> Hypotheses:
    live, ended = state.live, state.ended
    width, room = options.beams // options.groups, options.max_new_tokens
    live = replace(live, key=options.normalised(live.key, room, prompt_lengths))
    # Live beams of a row that is done have been given up already.
    unused = jnp.repeat(state.closed, width, axis=1)
    dropped = jnp.zeros(live.key.shape, bool)
    if options.truncated == "drop":
        dropped = jnp.repeat(ended.valid.reshape(*state.closed.shape, width).any(-1), width, axis=1)
    live = live.void_where(unused | dropped)
    groups = [
        jax.tree.map(lambda x, own=slice(g * width, (g + 1) * width): x[:, own], (ended, live))
        for g in range(options.groups)
    ]
    parts = [ended.joined(live).best(width) for ended, live in groups]
    best = parts[0].joined(*parts[1:]).best(options.beams)
    certified = None
    if objective.monotone and options.length_rule == "none" and options.groups == 1 and not options.stochastic:
        given_up = jnp.maximum(state.pruned, jnp.where(dropped, state.live.key, -jnp.inf).max(-1))
        certified = best.valid[:, 0] & (best.key[:, 0] >= given_up)
    length = jnp.where(best.valid, best.length, 0)
    return Hypotheses(
        tokens=jnp.where(jnp.arange(room) < length[..., None], best.tokens, 0),
        lengths=length,
        logp=jnp.where(best.valid, best.logp, -jnp.inf),
        ref_logp=jnp.where(best.valid, best.ref_logp, -jnp.inf) if has_reference else None,
        score=best.key,
        finish=jnp.where(best.valid, best.finish, Finish.INVALID),
        certified=certified,
    )
