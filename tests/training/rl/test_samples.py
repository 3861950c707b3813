"""Samples of the policy, their scores, and the batches they become."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.data.tokenization import Example, Response
from qstar_jax.decoding import SampleOptions
from qstar_jax.errors import InputError
from qstar_jax.scoring import score_policy
from qstar_jax.training.rl.batches import Batcher, padded_to
from qstar_jax.training.rl.sampling import PolicySampler, sample_keys
from qstar_jax.training.rl.source import Scorer

EOS = 2


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [Example(rng.integers(3, 40, n).astype(np.int32), False, (), row) for row, n in enumerate((1, 5, 3, 4))]


@pytest.fixture(scope="module", params=[1.0, 0.7])
def drawn(request, tiny_model, tiny_params, prompts, one_device):
    """(options, samples) at a temperature."""
    options = SampleOptions(6, (EOS,), num_samples=2, temperature=request.param)
    with jax.set_mesh(one_device):
        sampler = PolicySampler.of(tiny_model, options, one_device, [len(e.prompt) for e in prompts])
        assert sampler.is_exact == (request.param == 1)
        return options, sampler(tiny_params, prompts, sample_keys(0, 0, len(prompts)))


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_the_training_pass_scores_samples_as_the_sampler_did(
    layout, drawn, tiny_model, tiny_params, prompts, one_device
):
    options, samples = drawn
    lengths = {"prompts_per_part": 4, "samples": 2, "max_new_tokens": 6}
    batcher = Batcher.of([len(e.prompt) for e in prompts], layout, one_device, **lengths)
    with jax.set_mesh(one_device):
        batch = batcher(prompts, samples.responses)
        scores = score_policy(tiny_model, tiny_params, batch)
        tempered = score_policy(tiny_model, tiny_params, batch, temperature=options.temperature)
        sampled = jnp.where(scores.mask, padded_to(samples.logp, scores.logp.shape[-1]), 0.0)
        np.testing.assert_allclose(scores.logp, sampled, atol=2e-5)
        # The tempered policy: log softmax of logits over the temperature, token by token.
        for b, example in enumerate(prompts):
            for n, response in enumerate(samples.responses[b]):
                text = np.concatenate([example.prompt, response.ids])[None]
                logits = np.asarray(tiny_model.logits(tiny_params, jnp.asarray(text)))[0, len(example.prompt) - 1 : -1]
                logp = jax.nn.log_softmax(logits / options.temperature)[np.arange(len(response.ids)), response.ids]
                np.testing.assert_allclose(tempered.logp[b, n, : len(response.ids)], logp, atol=2e-5)


@pytest.mark.slow
def test_the_gradient_at_a_temperature_is_that_of_the_divided_logits(tiny_model, tiny_params, prompts, one_device):
    responses = [(Response(np.array([5, 9, EOS], np.int32), False),)] * 4
    lengths = {"prompts_per_part": 4, "samples": 1, "max_new_tokens": 3}
    batch = Batcher.of([5], "plain", one_device, **lengths)(prompts, responses)

    def total(params):
        return score_policy(tiny_model, params, batch, temperature=0.7).logp.sum()

    def expected(params):
        rows = [np.concatenate([e.prompt, responses[0][0].ids]) for e in prompts]
        logps = [jax.nn.log_softmax(tiny_model.logits(params, jnp.asarray(row)[None])[0] / 0.7) for row in rows]
        return sum(x[jnp.arange(len(r) - 4, len(r) - 1), r[-3:]].sum() for x, r in zip(logps, rows, strict=True))

    with jax.set_mesh(one_device):
        found, right = (jax.jit(jax.grad(f))(tiny_params) for f in (total, expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-3), found, right)


def test_keys_are_those_of_the_step_and_the_place():
    data = lambda *args: jax.random.key_data(sample_keys(*args))  # noqa: E731
    assert (data(0, 3, 4)[:2] == data(0, 3, 2)).all()
    assert (data(0, 3, 2) != data(0, 4, 2)).any() and (data(0, 3, 2) != data(1, 3, 2)).any()


def test_batches_have_one_shape(prompts, one_device):
    lengths = {"prompts_per_part": 2, "samples": 2, "max_new_tokens": 6, "parts": 2}
    batcher = Batcher.of([len(e.prompt) for e in prompts], "shared", one_device, **lengths)
    short = Response(np.array([EOS], np.int32), False)
    long = Response(np.arange(3, 9, dtype=np.int32), True)
    batches = [batcher(prompts, [(one, other)] * 4) for one, other in ((short, short), (long, long), (short, long))]
    shapes = [jax.tree.map(jnp.shape, batch) for batch in batches]
    assert shapes[0] == shapes[1] == shapes[2] and batches[0].tokens.shape[0] == 2


@pytest.fixture
def scorer(tiny_tokenizer, prompts):
    texts = {example.row: f"prompt {example.row}" for example in prompts}
    return Scorer("prompts.jsonl", texts, tiny_tokenizer, lambda pairs: [float(len(r)) for _, r in pairs])


def test_scores_are_of_texts_without_eos_and_truncation_costs_its_penalty(scorer, prompts, tiny_tokenizer):
    ids = tiny_tokenizer.convert_tokens_to_ids(["w1", "w2"])
    ended, truncated = Response(np.array([*ids, EOS], np.int32), False), Response(np.array(ids, np.int32), True)
    np.testing.assert_array_equal(scorer(prompts[:1], [(ended, truncated)]), [[5.0, 5.0]])
    strict = replace(scorer, missing_eos_penalty=1.5)
    np.testing.assert_array_equal(strict(prompts[:1], [(ended, truncated)]), [[5.0, 3.5]])
    without = replace(strict, reward=None)
    np.testing.assert_array_equal(without(prompts[:1], [(ended, truncated)]), [[0.0, -1.5]])


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 1e39])
def test_a_response_without_a_reward_is_named(value, scorer, prompts, tiny_tokenizer):
    response = Response(np.array([*tiny_tokenizer.convert_tokens_to_ids(["w1"]), EOS], np.int32), False)
    with pytest.raises(InputError, match=r"prompts\.jsonl row 2: the reward of the response 'w1'.*finite"):
        replace(scorer, reward=lambda pairs: [1.0, 1.0, value, 1.0])(prompts[:2], [(response, response)] * 2)
    with pytest.raises(InputError, match=r"prompts\.jsonl: 3 rewards of 4 responses; expected one each"):
        replace(scorer, reward=lambda pairs: [1.0] * 3)(prompts[:2], [(response, response)] * 2)
