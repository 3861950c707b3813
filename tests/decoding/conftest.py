"""Models small enough to enumerate, and policies whose probabilities are written down in tables."""

import itertools
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.models import CausalLM

FACTOR = 1000003  # of the hash of a text


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextMemory:
    """The hash of each prompt [B], and the tokens of each pool [B, M]."""

    prompt: jax.Array
    pool: jax.Array

    def reorder(self, slots):
        return replace(self, pool=jnp.take_along_axis(self.pool, slots, axis=1))


def hashed(texts, mask, start):
    """Polynomial hash of the masked tokens of `texts` [..., S], in their order; it tells orders apart."""

    def add(h, token_and_mask):
        token, seen = token_and_mask
        return jnp.where(seen, h * jnp.uint32(FACTOR) + token.astype(jnp.uint32) + 1, h), None

    last = [jnp.moveaxis(x, -1, 0) for x in (texts, mask)]
    return jax.lax.scan(add, start, tuple(last))[0]


@dataclass(frozen=True)
class HistoryLM:
    """A policy whose next token depends on all that was said: row `hash % N` of a table of logits [N, V].

    It reads its past off the pool through `path` alone, so whoever mixes up ancestors gets other probabilities.
    """

    def prefill(self, params, prompts, prompt_lengths, slots):
        inside = jnp.arange(prompts.shape[1]) < prompt_lengths[:, None]
        found = hashed(prompts, inside, jnp.zeros(len(prompts), jnp.uint32))
        pool = jnp.zeros((len(prompts), slots), jnp.int32)
        return self.logits(params, found), TextMemory(found, pool)

    def extend(self, params, memory, tokens, path, slot):
        pool = jax.lax.dynamic_update_slice(memory.pool, tokens, (0, slot))
        start = jnp.broadcast_to(memory.prompt[:, None], tokens.shape)
        found = hashed(jnp.broadcast_to(pool[:, None], path.shape), path, start)
        return self.logits(params, found), replace(memory, pool=pool)

    def logits(self, params, found):
        return params["logits"][found % params["logits"].shape[0]]


@dataclass(frozen=True)
class TableLM:
    """A policy read off a table of logits [step, last token, next token]; the last step goes on for ever."""

    def prefill(self, params, prompts, prompt_lengths, slots):
        last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[:, 0]
        pool = jnp.zeros((len(prompts), slots), jnp.int32)
        return params["logits"][0, last], TextMemory(prompt_lengths, pool)

    def extend(self, params, memory, tokens, path, slot):
        table = params["logits"]
        return table[jnp.minimum(path.sum(-1), len(table) - 1), tokens], memory


@pytest.fixture(scope="session")
def table_lm():
    """`table_lm(probabilities)` makes (model, params) from next-token probabilities of each step, [T, V] or [T, V, V].

    The middle axis is the last token, for those that depend on it. Steps are those of the response, not of the prompt.
    """

    def make(probabilities):
        with np.errstate(divide="ignore"):
            logits = np.log(np.asarray(probabilities, np.float64)).astype(np.float32)
        if logits.ndim == 2:
            logits = np.repeat(logits[:, None], logits.shape[1], axis=1)
        return TableLM(), {"logits": jnp.asarray(logits)}

    return make


@pytest.fixture(scope="session")
def history_lm():
    """`history_lm(seed, vocabulary=5, size=5, scale=1.5, bias=0.0)` makes (model, params) of a random `HistoryLM`.

    `bias` is added to the logits of token 0, by which tests end responses. Its table is `size` wide, and the tokens
    behind `vocabulary` are impossible: one shape, so one program, for all.
    """

    def make(seed, vocabulary=5, size=5, scale=1.5, bias=0.0, dtype=np.float32):
        logits = scale * np.random.default_rng(seed).standard_normal((997, size))
        logits[:, 0] += bias
        logits[:, vocabulary:] = -np.inf
        return HistoryLM(), {"logits": jnp.asarray(logits, dtype)}

    return make


def log_softmax(row):
    """Log-probabilities of logits [V] in float64."""
    row = np.asarray(row, np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


@pytest.fixture(scope="session")
def history_next():
    """`history_next(params, prompt)(response)`: log pi of the next token [V] behind part of a response, in float64.

    Plain Python over whole texts: knows no beam, pool or path.
    """

    def of_prompt(params, prompt):
        table = np.asarray(params["logits"].astype(jnp.float32))

        @cache
        def compute(response):
            found = 0
            for token in [*prompt, *response]:
                found = (found * FACTOR + int(token) + 1) % 2**32
            return log_softmax(table[found % len(table)])

        return compute

    return of_prompt


@pytest.fixture(scope="session")
def history_logp(history_next):
    """`history_logp(params, prompt, response)`: log pi of each of its tokens and of what follows, [T + 1, V]."""

    def compute(params, prompt, response):
        after = history_next(params, prompt)
        return np.stack([after(tuple(response[:n])) for n in range(len(response) + 1)])

    return compute


@pytest.fixture(scope="session")
def every_response():
    """`every_response(logp, room, eos_ids)`: {response: sum of log pi} of all responses that are possible.

    A response ends at the first token that ends responses, or at `room` tokens.
    """

    def enumerate_responses(logp, room, eos_ids):
        found, open_ones = {}, {(): 0.0}
        for _ in range(room):
            longer = {
                (*text, v): score + row[v]
                for text, score in open_ones.items()
                for row in [logp(text)]
                for v in range(len(row))
                if row[v] > -np.inf
            }
            found |= {text: score for text, score in longer.items() if text[-1] in eos_ids}
            open_ones = {text: score for text, score in longer.items() if text[-1] not in eos_ids}
        return found | open_ones

    return enumerate_responses


def length_divisor(rule, penalty, length):
    """What a sum is divided by; written anew from the papers, not taken from the package."""
    return {"none": 1.0, "hf": length**penalty, "gnmt": ((5 + length) / 6) ** penalty}[rule]


@pytest.fixture(scope="session")
def plain_beam_search():
    """Beam search in lists of Python, one row, over `logp(text) -> [V]`: `[(text, score, sum, ended)]`, best first.

    It knows no slots, and keeps no more than the definition needs: unfinished texts, ended texts, one sort a step.
    `stops` is False to go on to the limit whatever the stopping rule says; `change(text, row)` are constraints, and
    `ends(text)` says whether a text has ended, by its last token unless told otherwise.
    """

    def search(logp, options, *, prompt_length=0, stops=True, change=lambda text, row: row, ends=None):
        ends = ends or (lambda text: text[-1] in options.eos_ids)
        width, room, penalty = options.beams, options.max_new_tokens, options.length_penalty
        extra = prompt_length if options.count_prompt else 0

        def normalised(score, length):
            return score / length_divisor(options.length_rule, penalty, length + extra)

        live, ended = [((), 0.0)], []
        for t in range(room):
            candidates = [
                (score + row[v], k, v, (*text, v))
                for k, (text, score) in enumerate(live)
                for row in [change(text, logp(text))]
                for v in range(len(row))
                if row[v] > -np.inf
            ]
            candidates.sort(key=lambda c: (-c[0], c[1], c[2]))
            limit = {"all": len(candidates), "hf": width, "t5x": 2 * width}[options.eos_rule]
            new = [c for c in candidates[:limit] if ends(c[3])]
            ended += [(c[3], normalised(c[0], t + 1), c[0], True) for c in new]
            ended = sorted(ended, key=lambda e: -e[1])[:width]
            live = [(c[3], c[0]) for c in candidates if not ends(c[3])][:width]
            if not live:
                break
            bound = room if options.early_stopping == "never" and penalty > 0 else t + 1
            full = len(ended) == width
            hopeless = full and normalised(live[0][1], bound) <= ended[-1][1]
            if stops and (hopeless or (full and options.early_stopping is True)):
                live = []
                break
        if options.truncated == "compete" or not ended:
            ended += [(text, normalised(score, room), score, False) for text, score in live]
        return sorted(ended, key=lambda e: -e[1])[:width]

    return search


@pytest.fixture(scope="session")
def padded():
    """`padded(prompts, width=3, pad=0)`: prompts as arrays, right-padded, and their lengths."""

    def make(prompts, width=3, pad=0):
        rows = [[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts]
        return jnp.array(rows, jnp.int32), jnp.array([len(prompt) for prompt in prompts], jnp.int32)

    return make


@pytest.fixture(scope="session")
def read_responses():
    """`read_responses(found, row)`: the responses of a row that exist, as tuples of tokens."""

    def read(found, row):
        return [
            tuple(np.asarray(found.tokens)[row, k, : found.lengths[row, k]].tolist())
            for k in range(found.lengths.shape[1])
            if found.finish[row, k] != 0
        ]

    return read


@pytest.fixture(scope="session")
def micro():
    """(model, params) of a Llama of five words whose next-token distributions depend on all tokens before."""
    config = {
        "model_type": "llama",
        "vocab_size": 5,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = CausalLM.from_hf(config)
    params = jax.jit(model.init)(jax.random.key(5))
    noise = jax.random.split(jax.random.key(6), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), noise)
    return model, jax.tree.map(lambda x, key: x + 0.5 * jax.random.normal(key, x.shape), params, noise)


ROOM = 16  # tokens of a row; one shape, so that one compiled program serves all tests


@pytest.fixture(scope="session")
def log_pi():
    """`log_pi(model, params, prompt, responses)`: log pi of every token of every response [N, T], by one full pass."""
    logits_of = jax.jit(CausalLM.logits, static_argnums=0)

    def compute(model, params, prompt, responses):
        responses = np.asarray(responses)
        rows = np.zeros((len(responses), ROOM), np.int32)
        start, stop = len(prompt), len(prompt) + responses.shape[1]
        rows[:, :start], rows[:, start:stop] = prompt, responses
        logits = np.asarray(logits_of(model, params, rows, np.full(len(rows), stop)), np.float64)[
            :, start - 1 : stop - 1
        ]
        logits -= logits.max(-1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(logp, responses[..., None], axis=-1)[..., 0]

    return compute


@pytest.fixture(scope="session")
def prefix_scores(micro, log_pi):
    """`prefix_scores(prompt)`: sum of log pi of every sequence of one to four words after a prompt of `micro`."""
    found = {}

    def compute(prompt):
        if tuple(prompt) not in found:
            sequences = np.array(list(itertools.product(range(5), repeat=4)))
            sums = np.cumsum(log_pi(*micro, prompt, sequences), axis=1)
            found[tuple(prompt)] = {
                tuple(sequence[: n + 1]): row[n]
                for sequence, row in zip(sequences.tolist(), sums, strict=True)
                for n in range(4)
            }
        return found[tuple(prompt)]

    return compute


@pytest.fixture(scope="session")
def all_responses(prefix_scores):
    """`all_responses(prompt, length, eos_ids)`: every response of `micro` and its score, best first."""

    def enumerate_responses(prompt, length, eos_ids):
        def is_response(tokens):
            ends = tokens[-1] in eos_ids or len(tokens) == length
            return ends and len(tokens) <= length and not set(tokens[:-1]) & set(eos_ids)

        responses = [item for item in prefix_scores(prompt).items() if is_response(item[0])]
        return sorted(responses, key=lambda item: -item[1])

    return enumerate_responses
