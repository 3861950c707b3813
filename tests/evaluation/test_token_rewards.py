"""What else the policy could have said, against whole logits answer by answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.loading import load_examples
from qstar_jax.errors import InputError
from qstar_jax.evaluation import token_rewards
from qstar_jax.evaluation.pieces import lone_piece
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.models.head import Head
from qstar_jax.models.logprobs import top_logprobs
from qstar_jax.scoring import reference_entropies, response_alternatives
from qstar_jax.store.open import LoadedModel

BETA = 0.2


@pytest.fixture(scope="module")
def policy_params(tiny_params):
    return jax.tree.map(lambda x: x * 1.05 + 0.01, tiny_params)


@pytest.fixture(scope="module")
def full_logprobs(tiny_model):
    """`full_logprobs(params, example, r)`: log softmax [T, V] in float64 at answer r, by itself behind its prompt."""
    logits_of = jax.jit(tiny_model.logits)

    def compute(params, example, r):
        ids = np.concatenate([example.prompt, example.responses[r].ids])
        row = jnp.zeros((1, 32), jnp.int32).at[0, : len(ids)].set(ids)
        logits = np.asarray(logits_of(params, row, jnp.array([len(ids)]))[0], np.float64)
        z = logits[len(example.prompt) - 1 : len(ids) - 1]
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    return compute


@pytest.mark.parametrize("layout", ["packed", "shared", "plain"])
def test_alternatives_are_the_top_of_the_softmax_in_every_layout(
    layout, tiny_model, tiny_params, policy_params, pair_batch, random_examples, full_logprobs
):
    batch = pair_batch(5, layout=layout, fill_to=6)
    ask = jax.jit(lambda *x: response_alternatives(tiny_model, *x, count=4))
    ids, logp, ref_logp = ask(policy_params, tiny_params, batch)
    assert ids.shape == logp.shape == ref_logp.shape == (*batch.index.shape, 4)
    assert logp.dtype == ref_logp.dtype == jnp.float32
    for b, example in enumerate(random_examples(5)):
        for r, response in enumerate(example.responses):
            policy, reference = (full_logprobs(params, example, r) for params in (policy_params, tiny_params))
            expected = np.argsort(-policy, axis=-1)[:, :4]
            at = (b, r, slice(len(response.ids)))
            np.testing.assert_array_equal(ids[at], expected)
            for found, whole in ((logp, policy), (ref_logp, reference)):
                np.testing.assert_allclose(found[at], np.take_along_axis(whole, expected, -1), rtol=0, atol=2e-5)


def test_chunks_change_nothing():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, table, ref_hidden, ref_table = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(2, 11, 8), (30, 8), (2, 11, 4), (30, 4)], strict=True)
    )
    models = (hidden, Head(table), ref_hidden, Head(ref_table))
    for one, other in zip(top_logprobs(*models, 3), top_logprobs(*models, 3, chunk_size=4), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def scoring(tiny_model, tiny_params, policy_params, tiny_tokenizer, eval_file, one_device):
    policy = LoadedModel(tiny_model, policy_params, tiny_tokenizer, {}, None)
    dataset = load_examples(str(eval_file), "", "preferences", tiny_tokenizer, DataOptions(), 5)

    def score(**options):
        with jax.set_mesh(one_device):
            return score_dataset(policy, tiny_params, dataset, beta=BETA, batch_size=2, mesh=one_device, **options)

    return dataset.examples, score


def test_records_hold_texts_rewards_and_order(scoring, tiny_params, policy_params, full_logprobs, tiny_tokenizer):
    examples, score = scoring
    records = iter(score(alternatives=3))
    for example in examples:
        for r in range(2):
            policy, reference = (full_logprobs(params, example, r) for params in (policy_params, tiny_params))
            for t, position in enumerate(next(records).alternatives):
                ids = np.argsort(-policy[t])[:3]
                assert [a.piece for a in position] == [lone_piece(int(token), tiny_tokenizer) for token in ids]
                np.testing.assert_allclose([a.logp for a in position], policy[t, ids], rtol=0, atol=2e-5)
                rewards = BETA * (policy[t, ids] - reference[t, ids])
                np.testing.assert_allclose([a.reward for a in position], rewards, rtol=0, atol=2e-5)


def test_alternatives_are_kept_for_the_first_examples_only(scoring):
    _, score = scoring
    none, some = score(), score(alternatives=1, first=3)
    assert all(record.alternatives == () for record in none)
    assert [bool(record.alternatives) for record in some] == [True] * 6 + [False] * 4
    assert [record.logp for record in none] == [record.logp for record in some]


def test_numbers_that_are_not_finite_are_refused(scoring, tiny_params, monkeypatch):
    columns = token_rewards._columns

    def broken(scores, beta):
        arrays = {name: np.array(values) for name, values in columns(scores, beta).items()}
        arrays["logp"][1, 0, 1] = np.nan
        return arrays

    monkeypatch.setattr(token_rewards, "_columns", broken)
    with pytest.raises(InputError, match=r"row 2: logp of token 2 is nan; expected finite numbers"):
        scoring[1]()


def test_more_than_the_vocabulary_is_refused(scoring):
    with pytest.raises(InputError, match=r"--alternatives 61.*0 to 60"):
        scoring[1](alternatives=61)


def test_entropies_are_those_of_the_reference(
    tiny_model, tiny_params, policy_params, pair_batch, random_examples, full_logprobs
):
    batch = pair_batch(5)
    found = np.asarray(jax.jit(lambda *x: reference_entropies(tiny_model, *x))(policy_params, tiny_params, batch))
    for b, example in enumerate(random_examples(5)):
        for r, response in enumerate(example.responses):
            logp, n = full_logprobs(tiny_params, example, r), len(response.ids)
            np.testing.assert_allclose(found[b, r, :n], -(np.exp(logp) * logp).sum(-1), atol=3e-5)
            assert not found[b, r, n:].any()
