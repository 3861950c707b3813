"""Dialogues of a policy with an environment: greedy, sampled, or by beam search over turns.

The policy speaks until its turn ends, the environment replies, and so on. Only the policy's tokens are actions: a
dialogue's score is the sum of their log-probabilities, and the environment's tokens are free. By Eq. 13 this is search
for reward where the environment is deterministic. Turns are made by one compiled program, and replies read by another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qstar_jax.decoding.policies import Memory, Policy

# (row, the policy's turns so far) -> token ids of the reply, up to where the policy speaks again; None: it ends here.
Environment = Callable[[int, tuple[tuple[int, ...], ...]], Sequence[int] | None]


@dataclass(frozen=True)
class DialogueOptions:
    """How dialogues are made; hashable.

    Attributes:
        eos: Token that ends a turn, and counts as an action.
        max_turns: Most turns of the policy.
        max_turn_tokens: Longest turn, EOS included; longer ones are cut there.
        max_reply_tokens: Longest reply.
        beams: Dialogues that are kept per prompt.
        temperature: 0 takes the most likely tokens; otherwise one dialogue is sampled per prompt.
    """

    eos: int
    max_turns: int
    max_turn_tokens: int
    max_reply_tokens: int
    beams: int = 1
    temperature: float = 0.0

    def __post_init__(self):
        """Refuses what cannot be done together."""
        if self.temperature and self.beams > 1:
            raise ValueError(f"temperature {self.temperature:g} samples one dialogue; {self.beams} beams need 0")


@dataclass(frozen=True)
class Dialogue:
    """A dialogue.

    Attributes:
        turns: Token ids of the policy's turns, EOS included.
        replies: Token ids of the replies between them, one fewer where the environment ended the dialogue.
        logp: Sum of log pi of the policy's tokens, in nats.
        ended: Whether the environment ended it, and no limit.
    """

    turns: tuple[tuple[int, ...], ...]
    replies: tuple[tuple[int, ...], ...]
    logp: float
    ended: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """K dialogues of each of B prompts.

    Attributes:
        memory: What the policy remembers.
        logits: Logits of the next token of each. Shape [B, K, V].
        path: Slots of the pool that belong to each. Shape [B, K, M].
        score: Sum of log pi of the actions; -inf for beams that do not exist yet. Shape [B, K].
        parents: Dialogue, before this turn, that each continues. Shape [B, K].
        turn: Tokens of this turn, 0 after its end. Shape [B, K, L].
        silent: Whether the turn, or the dialogue, has ended. Shape [B, K].
    """

    memory: Memory
    logits: Float[Array, "B K V"]
    path: Bool[Array, "B K M"]
    score: Float[Array, "B K"]
    parents: Int[Array, "B K"]
    turn: Int[Array, "B K L"]
    silent: Bool[Array, "B K"]


def converse(
    policy: Policy,
    params: Any,
    prompt: Sequence[int],
    environments: int,
    environment: Environment,
    options: DialogueOptions,
    key: Key[Array, ""] | None = None,
) -> list[list[Dialogue]]:
    """Makes dialogues that begin with the same prompt, each with an environment of its own.

    Args:
        policy: The policy.
        params: Its parameters.
        prompt: Token ids, up to where the policy speaks.
        environments: Number of environments, B.
        environment: Replies, for any of them.
        options: Limits, beams and temperature.
        key: Key of the samples; only where `options.temperature` is not 0.

    Returns:
        For each environment its dialogues, best first; as many as there are beams.
    """
    o, rows = options, environments
    width = o.beams * (o.max_turn_tokens + o.max_reply_tokens)  # slots of a turn and its reply
    tokens = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (rows, len(prompt)))
    state = _begin(policy, params, tokens, o.max_turns * width, o)
    dialogues = [[Dialogue((), (), 0.0, False)] * o.beams for _ in range(rows)]
    keys = jax.random.split(jax.random.key(0) if key is None else key, o.max_turns)
    for number in range(o.max_turns):
        # The policy speaks; a beam continues one of the dialogues before.
        slot = jnp.int32(number * width)
        state = _speak(policy, params, state, slot, keys[number], o)
        dialogues = _continued(dialogues, *jax.device_get((state.parents, state.turn, state.score)), o.eos)
        # The environments reply, where the dialogue has not ended.
        dialogues = [[_answered(environment, row, d) for d in beams] for row, beams in enumerate(dialogues)]
        if all(d.ended for beams in dialogues for d in beams):
            break
        replies, lengths = _replies(dialogues, o.max_reply_tokens)
        state = _hear(policy, params, state, replies, lengths, slot + o.beams * o.max_turn_tokens)
    return [sorted(beams, key=lambda d: -d.logp) for beams in dialogues]


@partial(jax.jit, static_argnums=(0, 3, 4))
def _begin(policy: Policy, params: Any, prompts: Int[Array, "B P"], slots: int, o: DialogueOptions) -> _State:
    """Reads the prompts. All beams begin alike, so only the first of them exists."""
    rows, width = prompts.shape
    logits, memory = policy.prefill(params, prompts, jnp.full(rows, width, jnp.int32), slots)
    shape = (rows, o.beams)
    return _State(
        memory=memory,
        logits=jnp.broadcast_to(logits[:, None], (*shape, logits.shape[-1])),
        path=jnp.zeros((*shape, slots), bool),
        score=jnp.broadcast_to(jnp.where(jnp.arange(o.beams) == 0, 0.0, -jnp.inf), shape),
        parents=jnp.broadcast_to(jnp.arange(o.beams), shape),
        turn=jnp.zeros((*shape, o.max_turn_tokens), jnp.int32),
        silent=jnp.zeros(shape, bool),
    )


@partial(jax.jit, static_argnums=(0, 5))
def _speak(policy: Policy, params: Any, state: _State, slot: Array, key: Array, o: DialogueOptions) -> _State:
    """Makes one turn of every dialogue, token by token; dialogues that have ended compete, but say nothing."""

    def step(state: _State, t: Array) -> tuple[_State, None]:
        logp = jax.nn.log_softmax(state.logits)
        vocabulary = logp.shape[-1]
        # Who is silent has one way to go on: token 0, which costs nothing and is not said.
        stay = jnp.where(jnp.arange(vocabulary) == 0, 0.0, -jnp.inf)
        totals = state.score[..., None] + jnp.where(state.silent[..., None], stay, logp)
        if o.temperature:
            tempered = jnp.where(state.silent[..., None], stay, logp / o.temperature)
            tokens = jax.random.categorical(jax.random.fold_in(key, t), tempered)
            parents = jnp.zeros_like(tokens)
            score = jnp.take_along_axis(totals, tokens[..., None], axis=-1)[..., 0]
        else:
            score, best = jax.lax.top_k(totals.reshape(len(totals), -1), o.beams)
            parents, tokens = best // vocabulary, best % vocabulary
        # Each beam takes over its parent's dialogue, and adds its token.
        take = lambda x: jnp.take_along_axis(x, parents.reshape(parents.shape + (1,) * (x.ndim - 2)), axis=1)  # noqa: E731
        silent = take(state.silent)
        own = jnp.arange(state.path.shape[-1]) == (slot + t * o.beams + jnp.arange(o.beams))[:, None]
        logits, memory = policy.extend(params, state.memory, tokens, take(state.path) | own, slot + t * o.beams)
        return _State(
            memory=memory,
            logits=jnp.where(silent[..., None], take(state.logits), logits),
            path=take(state.path) | (own & ~silent[..., None]),
            score=score,
            parents=take(state.parents),
            turn=take(state.turn).at[..., t].set(jnp.where(silent, 0, tokens)),
            silent=silent | (tokens == o.eos),
        ), None

    fresh = replace(
        state,
        parents=jnp.broadcast_to(jnp.arange(o.beams), state.parents.shape),
        turn=jnp.zeros_like(state.turn),
    )
    return jax.lax.scan(step, fresh, jnp.arange(o.max_turn_tokens))[0]


@partial(jax.jit, static_argnums=0)
def _hear(policy: Policy, params: Any, state: _State, replies: Array, lengths: Array, slot: Array) -> _State:
    """Reads the replies [B, K, R] in one pass; without a reply a dialogue has ended, and stays as it is."""
    rows, beams, width = replies.shape
    place = slot + jnp.arange(beams)[:, None] * width + jnp.arange(width)  # slot of each token, [K, R]
    said = jnp.arange(width) < lengths[..., None]
    # A token sees its dialogue, and its reply up to itself; padding lies on nobody's path but its own.
    at = jnp.arange(state.path.shape[-1]) == place[..., None]  # [K, R, M]
    sofar = jnp.cumsum(at & said[..., None], axis=2, dtype=bool)
    path = (state.path[:, :, None] | sofar | at).reshape(rows, beams * width, -1)
    logits, memory = policy.extend(params, state.memory, replies.reshape(rows, -1), path, slot)
    last = jnp.maximum(lengths - 1, 0)[..., None, None]
    after = jnp.take_along_axis(logits.reshape(rows, beams, width, -1), last, axis=2)[:, :, 0]
    ended = lengths == 0
    return replace(
        state,
        memory=memory,
        logits=jnp.where(ended[..., None], state.logits, after),
        path=state.path | (at & said[..., None]).any(2),
        silent=ended,
    )


def _continued(before: list[list[Dialogue]], parents: np.ndarray, turns: np.ndarray, scores: np.ndarray, eos: int):
    """Adds a turn to the dialogues that each beam continues; those that have ended stay as they are."""

    def one(dialogue: Dialogue, turn: list[int], score: float) -> Dialogue:
        if dialogue.ended:
            return replace(dialogue, logp=score)
        length = turn.index(eos) + 1 if eos in turn else len(turn)
        return replace(dialogue, turns=(*dialogue.turns, tuple(turn[:length])), logp=score)

    rows = zip(before, parents.tolist(), turns.tolist(), scores.tolist(), strict=True)
    return [[one(old[p], turn, s) for p, turn, s in zip(*row, strict=True)] for old, *row in rows]


def _answered(environment: Environment, row: int, dialogue: Dialogue) -> Dialogue:
    if dialogue.ended:
        return dialogue
    reply = environment(row, dialogue.turns)
    if reply is None:
        return replace(dialogue, ended=True)
    return replace(dialogue, replies=(*dialogue.replies, tuple(reply)))


def _replies(dialogues: list[list[Dialogue]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The last replies, right-padded [B, K, R], and their lengths [B, K]; 0 where a dialogue has ended."""
    replies = np.zeros((len(dialogues), len(dialogues[0]), width), np.int32)
    lengths = np.zeros(replies.shape[:2], np.int32)
    for row, beams in enumerate(dialogues):
        for beam, dialogue in enumerate(beams):
            if not dialogue.ended:
                reply = dialogue.replies[-1]
                if len(reply) > width:
                    raise ValueError(f"a reply has {len(reply)} tokens; max_reply_tokens is {width}")
                lengths[row, beam] = len(reply)
                replies[row, beam, : len(reply)] = reply
    return replies, lengths
