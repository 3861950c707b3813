"""Every family against torch transformers: logits, and gradients of a DPO step; and every way to compute them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_families import FAMILIES

from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.losses import make_loss
from qstar_jax.models import CausalLM, attention
from qstar_jax.models.flash_attention import flash_attention
from qstar_jax.scoring import score_policy
from qstar_jax.store import hub
from qstar_jax.training.objectives import preference_loss_fn

pytestmark = pytest.mark.parity

BETA = 0.5
LENGTHS = np.array([24, 7, 1])  # the first is longer than any window and than the contexts before any stretch

logits_of = jax.jit(CausalLM.logits, static_argnums=0)


def assert_close(actual, expected, tolerance):
    """No number is further off than that share of their standard deviation."""
    assert expected.std() > 0.1  # flat logits would agree with anything
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * expected.std())


def padded(texts):
    """Right-padded texts as (tokens, mask), numpy arrays."""
    mask = np.arange(max(map(len, texts))) < np.array([len(text) for text in texts])[:, None]
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = np.concatenate(texts)
    return tokens, mask


def test_logits(family, families, open_family, torch_family):
    torch = pytest.importorskip("torch")
    tokens, mask = padded([row[:length] for row, length in zip(families.rows(), LENGTHS, strict=True)])
    with torch.no_grad():
        expected = torch_family(family)(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits.numpy()
    actual = logits_of(*open_family(family), jnp.asarray(tokens), jnp.asarray(LENGTHS))
    assert_close(np.asarray(actual)[mask], expected[mask], 3e-5)


@pytest.fixture(scope="module")
def examples(random_examples):
    """Four pairs with prompts of 1 to 16 tokens and responses of 1 to 8."""
    return random_examples(4, seed=3, length=24)


# Packed rows hold what the other layouts do, and segments and positions besides: every family is packed, and two, whose
# positions are rotated in one and learned in the other, are laid out in each way.
LAYOUTS = [
    *((family, "packed") for family in FAMILIES),
    *((family, layout) for family in ("gemma2", "gpt2") for layout in ("plain", "shared")),
]
in_its_layouts = pytest.mark.parametrize("family, layout", LAYOUTS)


def batch_of(examples, layout):
    shapes = Shapes.of(examples, layout, batch_size=len(examples), row_length=64, multiple=8)
    return jax.tree.map(jnp.asarray, make_batch(examples, shapes))


def answers_of_torch(torch, model, examples):
    """log pi of each response in nats [B, 2], each in a row of its own."""
    texts = [np.concatenate([e.prompt, r.ids]) for e in examples for r in e.responses]
    starts = [len(e.prompt) for e in examples for _ in e.responses]
    tokens, mask = map(torch.tensor, padded(texts))
    logp = model(tokens, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(-1, tokens[:, 1:, None])[..., 0]
    own = mask[:, 1:] & (torch.arange(1, tokens.shape[1]) >= torch.tensor(starts)[:, None])
    return (logp * own).sum(-1).reshape(-1, 2)


def write_gradient_of_torch(torch, model, reference, examples, folder):
    """Writes the gradient of the mean DPO loss as if it were the model; returns the loss."""
    with torch.no_grad():
        expected = answers_of_torch(torch, reference, examples)
    ratios = answers_of_torch(torch, model, examples) - expected
    loss = -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
    loss.backward()
    model.save_pretrained(
        folder, state_dict={name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    )
    model.zero_grad(set_to_none=True)
    return loss.item()


@pytest.mark.thin("gemma2-packed", "gpt2-shared")
@in_its_layouts
def test_gradients_of_a_dpo_step(
    family, layout, open_family, torch_family, examples, tiny_tokenizer, tmp_path, assert_norm_close
):
    torch = pytest.importorskip("torch")
    model, params = open_family(family)
    expected_loss = write_gradient_of_torch(
        torch, torch_family(family), torch_family(family, 1), examples, tmp_path / "torch"
    )
    loss_fn = preference_loss_fn(model, make_loss(beta=BETA))
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, _), gradient = step(params, open_family(family, 1)[1], batch_of(examples, layout))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    hub.write_folder(tmp_path / "ours", model, gradient, tiny_tokenizer, "float32")  # as if it were the model
    actual, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "torch"))
    expected = {name.removeprefix("language_model."): value for name, value in expected.items()}
    assert all(np.linalg.norm(value) > 1e-4 for value in expected.values())
    assert_norm_close(actual, expected, 1e-4)


WAYS = ("dense", "blockwise", "flash")


@pytest.fixture
def ways(monkeypatch):
    """The kernels for TPUs run interpreted; `blockwise` cuts these rows into several blocks."""
    monkeypatch.setattr(attention, "flash_attention", partial(flash_attention, block_size=128, interpret=True))
    monkeypatch.setattr(attention, "blockwise_attention", partial(attention.blockwise_attention, block_size=16))


def plain_logprobs(model, params, examples, shape):
    """(logp, logz) of the responses' tokens [B, 2, T], from the logits of rows that hold one response each."""
    logp, logz = np.zeros((2, *shape), np.float32)
    texts = [np.concatenate([e.prompt, r.ids]) for e in examples for r in e.responses]
    tokens, mask = padded(texts)
    logits = np.asarray(logits_of(model, params, jnp.asarray(tokens), jnp.asarray(mask.sum(1))), np.float64)
    for row, text in enumerate(texts):
        start = len(examples[row // 2].prompt)
        z = logits[row, start - 1 : len(text) - 1]
        normaliser = np.log(np.exp(z).sum(-1))
        place = row // 2, row % 2, slice(len(z))
        logz[place], logp[place] = normaliser, z[np.arange(len(z)), text[start:]] - normaliser
    return logp, logz


@pytest.mark.thin("gemma2-packed", "gpt2-shared", "smollm3-packed")
@in_its_layouts
def test_all_layouts_and_kinds_of_attention_say_the_same(family, layout, ways, open_family, examples):
    model, params = open_family(family)
    batch = batch_of(examples, layout)
    expected = plain_logprobs(model, params, examples, batch.index.shape)
    for way in WAYS:
        model = replace(model, compute=replace(model.compute, attention=way))
        scores = jax.jit(score_policy, static_argnums=0)(model, params, batch)
        for own, other in zip((scores.logp, scores.logz), expected, strict=True):
            assert_close(own, other, 1e-5)
