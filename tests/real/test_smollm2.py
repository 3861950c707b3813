"""A real model, against torch transformers: QSTAR_REAL_MODEL names its folder."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.decoding import SampleOptions, sample
from qstar_jax.models.masks import right_padded
from qstar_jax.store.open import load_model

FOLDER = os.environ.get("QSTAR_REAL_MODEL", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.parity,
    pytest.mark.skipif(not FOLDER, reason="QSTAR_REAL_MODEL names no folder of a real model"),
]

PROMPTS = [
    "Hi",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Dear Ms. Okafor,\n\nThank you for your letter of 3 March. I am sorry to hear that the kettle",
    "Wie heißt die Hauptstadt von Österreich? Antwort:",
    "Q: If a train leaves at 9:40 and the journey takes 2 hours and 35 minutes, when does it arrive?\nA:",
    "Once upon a time there was a lighthouse keeper who had never seen the sea, because every evening when he climbed "
    "the stairs to light the lamp, a thick fog rolled in from the bay and covered",
]
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def ours(one_device):
    assert Path(FOLDER).is_dir(), f"QSTAR_REAL_MODEL={FOLDER} is no folder"
    return load_model(FOLDER, ComputeOptions(), one_device, MeshOptions())


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def oracle(torch):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(ours):
    return [np.array(ours.tokenizer(prompt).input_ids, np.int32) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(torch, oracle, prompts):
    """Logits of each prompt by itself."""
    with torch.no_grad():
        return [oracle(torch.tensor(prompt[None])).logits[0].numpy() for prompt in prompts]


def test_prompts_have_different_lengths(prompts):
    assert len({len(prompt) for prompt in prompts}) >= 7


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_of_padded_batches_equal_those_of_torch(side, ours, prompts, expected, left_padded):
    lengths = np.array([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    starts = width - lengths if side == "left" else 0 * lengths
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt, start in zip(tokens, prompts, starts, strict=True):
        row[start : start + len(prompt)] = prompt
    layout = (left_padded if side == "left" else right_padded)(jnp.asarray(lengths), width)
    hidden = jax.jit(ours.model.hidden_states)(ours.params, jnp.asarray(tokens), *layout)
    found = np.asarray(ours.model.head(ours.params).logits(hidden))
    for row, start, logits in zip(found, starts, expected, strict=True):
        np.testing.assert_allclose(row[start : start + len(logits)], logits, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_greedy_continuations_are_those_of_torch(torch, ours, oracle, prompts):
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    eos = oracle.generation_config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    found = sample(
        ours.model,
        ours.params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        None,
        SampleOptions(NEW_TOKENS, eos_ids, temperature=0.0),
    )
    for row, prompt in enumerate(prompts):
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "repetition_penalty": 1.0}
        with torch.no_grad():
            whole = oracle.generate(torch.tensor(prompt[None]), **options)[0].tolist()
        answer = found.tokens[row, 0, : found.lengths[row, 0]].tolist()
        assert answer == whole[len(prompt) :], PROMPTS[row]
