"""Adapters: what they compute, what is trained, and what their backward pass leaves out."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions, OptimizerOptions
from qstar_jax.errors import InputError
from qstar_jax.losses import make_loss
from qstar_jax.models import CausalLM
from qstar_jax.models.lora import Lora, attach_adapter, merge_adapter, split_adapter
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.step import TrainState, make_train_step

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

logits_of = jax.jit(CausalLM.logits, static_argnums=0)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model.with_lora(3, 12.0)


@pytest.fixture(scope="module")
def adapter(model):
    """An adapter whose second matrices are not 0."""
    fresh = jax.jit(model.init_adapter)(jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), fresh)


@pytest.fixture(scope="module")
def params(tiny_params, adapter):
    return attach_adapter(tiny_params, adapter)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(3, 60, (2, 9)), jnp.int32)


def test_a_merge_by_hand():
    one = jnp.ones((1, 1, 1))  # layers, inputs, outputs
    params = {"q": {"kernel": 2 * one, "lora": {"lora_a": 3 * one, "lora_b": 4 * one}}}
    merged = merge_adapter(params, Lora(rank=1, alpha=0.5, targets=("q_proj",)))
    np.testing.assert_array_equal(merged["q"]["kernel"], (2 + 0.5 * 3 * 4) * one)


def test_a_fresh_adapter_changes_nothing(model, tiny_model, tiny_params, tokens):
    fresh = attach_adapter(tiny_params, jax.jit(model.init_adapter)(jax.random.key(0)))
    np.testing.assert_array_equal(logits_of(model, fresh, tokens), logits_of(tiny_model, tiny_params, tokens))


def test_matrices_begin_as_those_of_peft(tiny_model):
    lora = jax.jit(tiny_model.with_lora(8, 8.0).init_adapter)(jax.random.key(0))["layers"]["attention"]["q"]["lora"]
    bound = 1 / np.sqrt(32)  # kaiming_uniform with a = sqrt(5)
    assert 0.9 * bound < np.abs(lora["lora_a"]).max() <= bound
    np.testing.assert_allclose(np.std(lora["lora_a"]), bound / np.sqrt(3), rtol=0.1)
    assert not np.any(lora["lora_b"])


def test_the_adapter_is_alpha_over_rank_times_a_b(model, tiny_model, params, tokens, assert_norm_close):
    """Against the plain model whose kernels are W + alpha / rank * A B, in numpy float64."""
    merged = split_adapter(params)[0]
    for group, parts in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for part in parts:
            kernel, lora = (params["layers"][group][part][name] for name in ("kernel", "lora"))
            product = np.einsum("lir,lro->lio", *(np.float64(lora[name]) for name in ("lora_a", "lora_b")))
            merged["layers"][group][part] = {"kernel": jnp.float32(np.float64(kernel) + 12.0 / 3 * product)}
    expected = logits_of(tiny_model, merged, tokens)
    assert np.abs(expected - logits_of(tiny_model, split_adapter(params)[0], tokens)).max() > 0.1
    assert_norm_close(logits_of(model, params, tokens), expected, 1e-5)
    assert_norm_close(merge_adapter(params, model.lora), merged, 1e-6)


def test_rank_stabilised_scale(tiny_model):
    assert tiny_model.with_lora(4, 8.0).lora.scale == 2.0
    assert tiny_model.with_lora(4, 8.0, rank_stabilised=True).lora.scale == 4.0


def test_split_and_attach_are_inverse(params, tiny_params, adapter):
    base, actual = split_adapter(params)
    jax.tree.map(np.testing.assert_array_equal, base, tiny_params)
    jax.tree.map(np.testing.assert_array_equal, actual, adapter)
    jax.tree.map(np.testing.assert_array_equal, attach_adapter(base, actual), params)
    assert split_adapter(tiny_params)[1] == {}


@pytest.mark.parametrize("targets", [("q_proj",), ("down_proj", "v_proj"), ALL], ids=str)
def test_targets_by_name(targets, tiny_model):
    model = tiny_model.with_lora(2, 2.0, targets)
    paths = {model.linear_layers[name] for name in targets}
    actual = {
        "/".join(path.split("/")[:-2])
        for path in (
            jax.tree_util.keystr(keys, simple=True, separator="/")
            for keys, _ in jax.tree_util.tree_leaves_with_path(jax.eval_shape(model.init_adapter, jax.random.key(0)))
        )
    }
    assert actual == paths and set(model.lora.targets) == set(targets)
    assert tuple(tiny_model.linear_layers) == ALL


SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
OTHERS = {
    "phi3": {**SIZES, "num_attention_heads": 4},
    "gpt_neox": {**SIZES, "num_attention_heads": 4},
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize(
    ("model_type", "targets", "meant"),
    [
        ("phi3", ["qkv_proj"], ("q_proj", "k_proj", "v_proj")),
        ("phi3", ["gate_up_proj", "self_attn.o_proj", "up_proj"], ("o_proj", "gate_proj", "up_proj")),
        ("gpt_neox", ["dense", "query_key_value"], ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("gpt_neox", ["dense_4h_to_h"], ("down_proj",)),
        ("gpt2", ["c_proj"], ("o_proj", "down_proj")),
        ("gpt2", ["mlp.c_proj", "c_attn"], ("q_proj", "k_proj", "v_proj", "down_proj")),
        ("gpt2", ["c_fc", "v_proj"], ("v_proj", "up_proj")),
    ],
    ids=str,
)
def test_targets_by_the_names_of_a_family(model_type, targets, meant):
    """A fused layer, or a name of several, stands for all that are meant."""
    model = CausalLM.from_hf({"model_type": model_type, **OTHERS[model_type]})
    assert model.with_lora(2, 2.0, targets).lora.targets == meant
    with pytest.raises(InputError, match=r"among q_proj, .*down_proj, (qkv_proj|query_key_value|c_attn), .*'roj'"):
        model.with_lora(2, 2.0, [*targets, "roj"])


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (0, None, r"whole number of at least 1 \(found: 0\)"),
        (1.5, None, r"found: 1\.5"),
        (2, ["query"], r"among q_proj, .*found: 'query'"),
        (2, [], r"found: none at all"),
    ],
)
def test_shapes_that_cannot_be_are_refused(rank, targets, message, tiny_model):
    with pytest.raises(InputError, match=message):
        tiny_model.with_lora(rank, 1.0, targets)


def test_base_in_bfloat16_and_adapter_in_float32(tiny_model):
    model = replace(tiny_model, compute=ComputeOptions(param_dtype="bfloat16", dtype="bfloat16")).with_lora(2, 4.0)
    base, adapter = split_adapter(model.abstract_params())
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    merged = jax.eval_shape(lambda x: merge_adapter(x, model.lora), attach_adapter(base, adapter))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(lambda x: (x.shape, x.dtype), base)


LOSS = make_loss(beta=0.5)


@partial(jax.jit, static_argnums=0)
def loss_and_gradient(model, params, frozen, ref_params, batch):
    def loss(trained):
        return preference_loss_fn(model, LOSS)(attach_adapter(frozen, trained), ref_params, batch)[0]

    return jax.value_and_grad(loss)(params)


def test_adapter_off_is_a_live_copy_of_the_base(model, tiny_params, adapter, pair_batch, assert_norm_close):
    batch = pair_batch(4)
    off = loss_and_gradient(model, adapter, tiny_params, None, batch)
    live = loss_and_gradient(model, adapter, tiny_params, tiny_params, batch)
    assert_norm_close(off, live, 1e-5)
    fresh = jax.jit(model.init_adapter)(jax.random.key(0))
    np.testing.assert_allclose(loss_and_gradient(model, fresh, tiny_params, None, batch)[0], np.log(2), rtol=1e-6)


def test_the_gradient_is_that_of_the_merged_kernels(
    model, tiny_model, tiny_params, adapter, pair_batch, assert_norm_close
):
    """d/dA = scale dW B^T and d/dB = scale A^T dW, from the plain model's gradient of its kernels."""
    batch = pair_batch(4)
    _, actual = loss_and_gradient(model, adapter, tiny_params, None, batch)
    merged = merge_adapter(attach_adapter(tiny_params, adapter), model.lora)
    _, kernels = loss_and_gradient(tiny_model, merged, {}, tiny_params, batch)
    for group, part in (("attention", "q"), ("attention", "o"), ("mlp", "down")):
        lora, grad = adapter["layers"][group][part]["lora"], kernels["layers"][group][part]["kernel"]
        expected = {
            "lora_a": 4.0 * jnp.einsum("lio,lro->lir", grad, lora["lora_b"]),
            "lora_b": 4.0 * jnp.einsum("lir,lio->lro", lora["lora_a"], grad),
        }
        assert_norm_close(actual["layers"][group][part]["lora"], expected, 1e-4)


def test_only_the_adapter_is_trained_and_no_gradient_of_the_base_is_computed(tiny_config, pair_batch):
    # Wide enough that the layers, not the vocabulary, cost most.
    config = tiny_config | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    full = CausalLM.from_hf(config)
    model = full.with_lora(2, 4.0)
    base = jax.jit(full.init)(jax.random.key(0))
    batch, optimizer = pair_batch(8), make_optimizer(OptimizerOptions(learning_rate=1e-2), 4)

    def program(model, params, frozen):
        step = make_train_step(preference_loss_fn(model, LOSS), optimizer)
        ref = None if frozen is not None else base
        state = TrainState(jnp.int32(0), params, optimizer.init(params), ref, frozen)
        return state, jax.jit(step).lower(state, batch).compile()

    adapter = jax.jit(model.init_adapter)(jax.random.key(1))
    state, small = program(model, adapter, base)
    _, large = program(full, base, None)
    moved, _ = small(state, batch)
    jax.tree.map(np.testing.assert_array_equal, moved.frozen, base)
    assert np.any(moved.params["layers"]["mlp"]["up"]["lora"]["lora_b"])
    # Of forward (1), reference (1) and backward (1 to inputs, 1 to weights) the last falls away.
    flops = [program.cost_analysis()["flops"] for program in (small, large)]
    assert flops[0] < 0.9 * flops[1]


@pytest.mark.slow
def test_memory_of_a_whole_step_does_not_grow_with_the_vocabulary(tiny_config, pair_batch):
    """With the embedding frozen nothing but chunks of logits grows; whole logits of long responses would not fit."""
    batch = pair_batch(8, length=2048, response_length=1024, row_length=4096)
    optimizer = make_optimizer(OptimizerOptions(), 4)

    def temporary(vocabulary):
        model = CausalLM.from_hf(tiny_config | {"vocab_size": vocabulary}).with_lora(2, 4.0)
        base, adapter = split_adapter(model.abstract_params())
        state = TrainState(jnp.int32(0), adapter, jax.eval_shape(optimizer.init, adapter), None, base)
        step = jax.jit(make_train_step(preference_loss_fn(model, LOSS), optimizer), donate_argnums=0)
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    logits = int(batch.response_lengths.sum()) * 64_000 * 4
    assert temporary(64_000) - temporary(1_000) < 0.25 * logits
