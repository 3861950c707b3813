"""Models small enough to enumerate, and one whose probabilities are written down by hand."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.models import CausalLM, KVCache


@dataclass(frozen=True)
class TableLM(CausalLM):
    """Next-token logits read off a table [position, last token, next token]; needs no cache, but hands one on."""

    model_type: str = "table"
    config: None = None

    def hidden_states(self, params, tokens, positions, mask, cache=None, cache_index=0):
        table = params["logits"]
        return table[jnp.minimum(positions, table.shape[0] - 1), tokens], cache

    def unembedding(self, params):
        return jnp.eye(params["logits"].shape[-1])

    def init_cache(self, rows, length):
        shape = (1, rows, length, 1, 1)
        return KVCache(keys=jnp.zeros(shape), values=jnp.zeros(shape))


@pytest.fixture(scope="session")
def table_lm():
    """`table_lm(probabilities)` makes (model, params) from next-token probabilities of each step, [T, V]."""

    def make(probabilities):
        logits = np.log(np.asarray(probabilities, np.float64)).astype(np.float32)
        return TableLM(), {"logits": jnp.asarray(np.repeat(logits[:, None], logits.shape[1], axis=1))}

    return make


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
    """`log_pi(model, params, prompt, answers)`: log pi of every token of every answer [N, T], by one full pass."""
    logits_of = jax.jit(CausalLM.logits, static_argnums=0)

    def compute(model, params, prompt, answers):
        answers = np.asarray(answers)
        rows = np.zeros((len(answers), ROOM), np.int32)
        start, stop = len(prompt), len(prompt) + answers.shape[1]
        rows[:, :start], rows[:, start:stop] = prompt, answers
        logits = np.asarray(logits_of(model, params, rows, np.full(len(rows), stop)), np.float64)[
            :, start - 1 : stop - 1
        ]
        logits -= logits.max(-1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(logp, answers[..., None], axis=-1)[..., 0]

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
def all_answers(prefix_scores):
    """`all_answers(prompt, length, eos_ids)`: every answer of `micro` and its score, best first."""

    def enumerate_answers(prompt, length, eos_ids):
        def is_answer(tokens):
            ends = tokens[-1] in eos_ids or len(tokens) == length
            return ends and len(tokens) <= length and not set(tokens[:-1]) & set(eos_ids)

        answers = [item for item in prefix_scores(prompt).items() if is_answer(item[0])]
        return sorted(answers, key=lambda item: -item[1])

    return enumerate_answers
