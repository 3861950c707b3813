"""Stages that are language models: what they are given, what they draw, and its log-ratio by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import pipeline
from qstar_jax.config import DataOptions
from qstar_jax.errors import InputError
from qstar_jax.models.lora import attach_adapter
from qstar_jax.pipeline import LanguageStage, Template
from qstar_jax.sharding import use_mesh

PROMPTS = ["w1 w2", "w3 w4 w5 w6"]


@pytest.fixture
def two(tiny_model, tiny_tokenizer, one_device):
    """An outline stage and a text stage that reads prompt and outline."""
    common = {"model": tiny_model, "tokenizer": tiny_tokenizer, "eos_ids": (2,), "mesh": one_device}
    common |= {"max_new_tokens": 5, "data": DataOptions(max_length=40, max_prompt_length=30)}
    outline = LanguageStage("outline", **common)
    text = LanguageStage(
        "text", template=Template("{prompt} w7 {outline}"), earlier={"outline": outline.read}, beta=0.2, **common
    )
    return outline, text


def log_prob(model, params, tokens, start):
    """Sum of log pi of tokens[start:], by the logits of one text."""
    logp = jax.nn.log_softmax(model.logits(params, jnp.asarray(tokens)[None])[0].astype(jnp.float32))
    return sum(float(logp[i - 1, tokens[i]]) for i in range(start, len(tokens)))


@pytest.mark.slow
def test_a_pipeline_of_two_models_draws_and_scores_its_texts(two, tiny_model, tiny_params, tiny_tokenizer, one_device):
    stages = [stage.stage(tiny_params) for stage in two]
    moved = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), tiny_params)
    with use_mesh(one_device, "float32"):
        outputs = pipeline.sample(stages, [tiny_params] * 2, jax.random.key(1), PROMPTS)
        again = pipeline.sample(stages, [tiny_params] * 2, jax.random.key(1), PROMPTS)
        rewards = pipeline.stage_rewards(stages, [moved, moved], None, outputs)
        at_reference = pipeline.stage_rewards(stages, [tiny_params, None], None, outputs)
    texts = [stage.read(output) for stage, output in zip(two, outputs, strict=True)]
    assert texts == [stage.read(output) for stage, output in zip(two, again, strict=True)]
    np.testing.assert_allclose(at_reference, 0, atol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        given = (prompt, f"{prompt} w7 {texts[0][row]}")
        for place, output in enumerate(outputs):
            length = int(output.response_lengths[row, 0])
            ids = np.asarray(output.targets).reshape(-1)[np.asarray(output.index)[row, 0, :length]].tolist()
            start = tiny_tokenizer(given[place]).input_ids
            old, new = (log_prob(tiny_model, p, start + ids, len(start)) for p in (tiny_params, moved))
            np.testing.assert_allclose(rewards[row, place], stages[place].beta * (new - old), rtol=1e-3, atol=1e-4)
            assert bool(output.truncated[row, 0]) == (ids[-1] != 2) and length <= 5


def test_the_reference_of_an_adapter_is_the_model_without_it(two, tiny_params, one_device):
    stage = replace(two[0], model=two[0].model.with_lora(2, 4.0, None))
    adapter = jax.tree.map(lambda x: x + 0.1, stage.model.init_adapter(jax.random.key(0)))
    params = attach_adapter(tiny_params, adapter)
    with use_mesh(one_device, "float32"):
        [output] = pipeline.sample([stage.stage()], [params], jax.random.key(0), PROMPTS)
        alone = pipeline.stage_rewards([stage.stage()], [params], None, [output])
        beside = pipeline.stage_rewards([stage.stage(tiny_params)], [params], None, [output])
    assert np.abs(alone).min() > 1e-3
    np.testing.assert_allclose(alone, beside, atol=1e-6)


def test_texts_that_do_not_fit_are_refused_by_row(two):
    short = replace(two[0], data=DataOptions(max_length=6, max_prompt_length=4))
    with pytest.raises(InputError, match=r"rows.jsonl row 2, stage outline: the prompt does not fit"):
        short.examples(["w1", "w1 w2 w3 w4 w5"], source="rows.jsonl")
    with pytest.raises(InputError, match=r"rows.jsonl row 8, stage outline: the response does not fit"):
        short.examples(["w1"], ["w1 w2 w3 w4 w5 w6 w7"], source="rows.jsonl", rows=[7])
