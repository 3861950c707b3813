"""Beam search by the unnormalised sum of log pi: the paper's reward-guided search (Eq. 13) in its likelihood form."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int

from qstar_jax.decoding.cached_model import DecodeState, feed, prefill
from qstar_jax.decoding.hypotheses import Hypotheses
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Beam:
    """K hypotheses a prompt, best first: live ones, or ended ones. Scores are float32 sums of log pi, -inf if void."""

    tokens: Int[Array, "B K T"]
    lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]

    def best(self, count: int) -> "_Beam":
        scores, order = jax.lax.top_k(self.scores, count)
        tokens = jnp.take_along_axis(self.tokens, order[..., None], axis=1)
        return _Beam(tokens, jnp.take_along_axis(self.lengths, order, axis=1), scores)

    def __add__(self, other: "_Beam") -> "_Beam":
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), self, other)


@partial(jax.jit, static_argnames=("model", "beams", "max_new_tokens", "eos_ids"))
def beam_search(
    model: CausalLM,
    params: Params,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    *,
    beams: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
) -> Hypotheses:
    """Searches for the answers of highest log-likelihood.

    At every step each live hypothesis is extended by every token. Its extensions by EOS compete for the K places of
    ended answers, all others for the K places of live ones, so that an unlikely EOS is never crowded out. As scores can
    only fall, the search of all rows stops once no live hypothesis is better than the worst of K ended ones. Answers
    that run into the limit compete at the end on equal terms, and are marked as not finished. There is no length
    penalty: with one, search by likelihood and search by reward would no longer be the same.

    Args:
        model: The model.
        params: Its parameters.
        prompts: Right-padded token ids. Shape [B, P].
        prompt_lengths: Tokens of each prompt, at least 1. Shape [B].
        beams: Width of the search, K.
        max_new_tokens: Longest answer T, EOS included.
        eos_ids: Tokens that end an answer.

    Returns:
        The K best answers of each prompt, best first; `logp` is the score.

    References:
        arXiv 2404.12358, Eq. 12 and 13: with rewards beta * (log pi - log pi_ref), guided search maximises beta * log
        pi plus a constant.
    """
    rows = prompts.shape[0]
    state = prefill(model, params, prompts, prompt_lengths, max_new_tokens)
    state = state.take(jnp.repeat(jnp.arange(rows), beams))
    void = _Beam(
        tokens=jnp.zeros((rows, beams, max_new_tokens), jnp.int32),
        lengths=jnp.zeros((rows, beams), jnp.int32),
        scores=jnp.full((rows, beams), -jnp.inf),
    )
    # All beams start from the same prompt: one of them is live, or the same answer would be found K times.
    live = _Beam(void.tokens, void.lengths, void.scores.at[:, 0].set(0.0))

    def step(carry, t):
        live, ended, state = carry
        live, new_ended, parents = _extend(live, state.logits, t, eos_ids)
        ended = (ended + new_ended).best(beams)
        row_of_parent = (jnp.arange(rows)[:, None] * beams + parents).reshape(-1)
        token = live.tokens[:, :, t].reshape(-1)
        hopeless = (live.scores[:, 0] <= ended.scores[:, -1]).all()

        def go_on(state: DecodeState) -> DecodeState:
            return feed(model, params, state.take(row_of_parent), token, t, max_new_tokens)

        state = jax.lax.cond(hopeless | (t == max_new_tokens - 1), lambda state: state, go_on, state)
        # Once the search is over its state stands still, so live hypotheses must not be extended from it any more.
        live = _Beam(live.tokens, live.lengths, jnp.where(hopeless, -jnp.inf, live.scores))
        return (live, ended, state), None

    (live, ended, _), _ = jax.lax.scan(step, (live, void, state), jnp.arange(max_new_tokens))
    best = (ended + live).best(beams)
    last = jnp.take_along_axis(best.tokens, jnp.maximum(best.lengths - 1, 0)[..., None], axis=-1)[..., 0]
    finished = (last[..., None] == jnp.array(eos_ids)).any(-1) & (best.scores > -jnp.inf)
    lengths = jnp.where(best.scores > -jnp.inf, best.lengths, 0)
    return Hypotheses(tokens=best.tokens, lengths=lengths, logp=best.scores, finished=finished)


def _extend(live: _Beam, logits: Float[Array, "BK V"], t: Int[Array, ""], eos_ids: tuple[int, ...]):
    """Extends live hypotheses by one token: the new live ones, those that end here, the live ones' parents."""
    beams = live.scores.shape[1]
    logp = rearrange(jax.nn.log_softmax(logits), "(b k) v -> b k v", k=beams)
    scores = live.scores[..., None] + logp
    vocabulary = scores.shape[-1]

    eos = jnp.array(eos_ids, jnp.int32)
    eos_tokens = repeat(live.tokens, "b k t -> b (k e) t", e=len(eos_ids))
    eos_tokens = eos_tokens.at[:, :, t].set(jnp.tile(eos, beams))
    ended = _Beam(
        tokens=eos_tokens,
        lengths=jnp.full(eos_tokens.shape[:2], t + 1),
        scores=rearrange(scores[..., eos], "b k e -> b (k e)"),
    )
    candidates = rearrange(scores.at[..., eos].set(-jnp.inf), "b k v -> b (k v)")
    best, choice = jax.lax.top_k(candidates, beams)
    parents, token = choice // vocabulary, choice % vocabulary
    tokens = jnp.take_along_axis(live.tokens, parents[..., None], axis=1).at[:, :, t].set(token)
    return _Beam(tokens, jnp.full(best.shape, t + 1), best), ended, parents
