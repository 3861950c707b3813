"""Searches with a cache against full passes of a transformer: keys and values stay where they are."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.models import CausalLM

PROMPTS = [[1, 0, 3], [4], [2, 0]]  # 0 is EOS, padding, and a word of these prompts
OPTIONS = BeamOptions(3, 4, (0,))
CLOSE = {"rtol": 0, "atol": 2e-5}  # float32 sums of four log-probabilities, by passes of different shapes


@pytest.fixture(scope="module")
def search(padded):
    def run(policy, options=OPTIONS, prompts=PROMPTS, **layout):
        return jax.device_get(beam_search(*policy, *padded(prompts, **layout), options))

    return run


@pytest.fixture(scope="module")
def unstacked(micro):
    model, params = micro
    return model, model.unstack(params)


@pytest.fixture(scope="module")
def full_passes(prefix_scores, plain_beam_search):
    """The same search in plain Python over probabilities of full passes: [(text, score, ...)] of each prompt."""

    def of_prompt(prompt, options):
        sums = prefix_scores(prompt) | {(): 0.0}
        return plain_beam_search(lambda text: [sums[(*text, v)] - sums[text] for v in range(5)], options)

    return lambda options: [of_prompt(prompt, options) for prompt in PROMPTS]


def same(found, expected, read_responses):
    """Whether all responses are those that are expected, and their scores too."""
    return all(
        read_responses(found, row) == [text for text, *_ in responses]
        and np.allclose(found.score[row, : len(responses)], [a[1] for a in responses], **CLOSE)
        for row, responses in enumerate(expected)
    )


@dataclass(frozen=True)
class Forgetful:
    """A policy that believes that every beam has always been in its own place."""

    policy: Any
    beams: int

    def prefill(self, *arguments):
        return self.policy.prefill(*arguments)

    def extend(self, params, memory, tokens, path, slot):
        slots = jnp.arange(path.shape[-1])
        own = (slots % self.beams == jnp.arange(self.beams)[:, None]) & (slots < slot + self.beams)
        return self.policy.extend(params, memory, tokens, jnp.broadcast_to(own, path.shape), slot)


def test_a_search_with_a_cache_is_a_search_by_full_passes(search, unstacked, full_passes, read_responses):
    expected = full_passes(OPTIONS)
    assert same(search(unstacked), expected, read_responses)
    # Mixing up the pasts of beams would show.
    model, params = unstacked
    assert not same(search((Forgetful(model, 3), params)), expected, read_responses)


def test_stacked_parameters_search_the_same(search, micro, full_passes, read_responses):
    assert same(search(micro), full_passes(OPTIONS), read_responses)


def test_every_history_has_its_own_future(search, history_lm, history_next, plain_beam_search, read_responses):
    # The same for a policy whose probabilities have nothing to do with each other once their histories differ.
    options, mismatches = BeamOptions(4, 6, (0,)), 0
    for seed in range(5):
        model, params = history_lm(seed, bias=-2.0)
        expected = [plain_beam_search(history_next(params, prompt), options) for prompt in PROMPTS]
        assert same(search((model, params), options), expected, read_responses)
        mismatches += not same(search((Forgetful(model, 4), params), options), expected, read_responses)
    assert mismatches == 5


def test_padding_of_prompts_has_no_effect(search, unstacked):
    one = search(unstacked)
    for layout in ({"pad": 4}, {"width": 6}, {"width": 6, "pad": 4}):
        other = search(unstacked, **layout)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.score, other.score, **CLOSE)
    # A 0 that is no padding is one token more: it is read.
    shorter = search(unstacked, prompts=[[1, 0, 3], [4], [2]])
    assert np.abs(shorter.score[2] - one.score[2]).max() > 1e-3


def test_scores_and_rewards_are_those_of_full_passes(search, micro, unstacked, log_pi, read_responses):
    model, params = unstacked
    other = jax.tree.map(lambda x: 0.7 * x, micro[1])
    found = search((Ensemble((model, model)), (params, model.unstack(other))))
    for row, prompt in enumerate(PROMPTS):
        texts = read_responses(found, row)
        assert len(texts) == 3
        for k, text in enumerate(texts):
            own, ref = (log_pi(model, p, prompt, [text]).sum() for p in (micro[1], other))
            np.testing.assert_allclose([found.logp[row, k], found.ref_logp[row, k]], [own, ref], **CLOSE)
            np.testing.assert_allclose(found.score[row, k], own, **CLOSE)
            assert abs(own - ref) > 1e-3


@pytest.mark.slow
def test_a_search_needs_little_memory_beside_its_cache(tiny_config):
    # Compiled only, in a shape in which the cache is nearly all there is: long responses, wide heads, and so many
    # layers that the part of one layer's pool which attention reads, of which there is a copy, is little.
    shape = {"num_hidden_layers": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    model = CausalLM.from_hf(tiny_config | shape)
    params = jax.eval_shape(lambda key: model.unstack(model.init(key)), jax.random.key(0))
    prompts, lengths = jax.ShapeDtypeStruct((4, 16), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    _, cache = jax.eval_shape(lambda *x: model.prefill(*x, 4 * 512), params, prompts, lengths)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert size > 2**25  # 32 MiB

    # 1.05 is measured. A step past the limit needs no copy either.
    for max_new_tokens in (512, 511):
        options = BeamOptions(4, max_new_tokens, (2,))
        analysis = beam_search.lower(model, params, prompts, lengths, options).compile().memory_analysis()
        assert 1 < analysis.temp_size_in_bytes / size < 1.1
