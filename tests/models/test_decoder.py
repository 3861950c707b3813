"""The network without any oracle: what goes through the scan, and that each field of its configuration counts."""

from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.decoder_config import DecoderConfig, LayerKind
from qstar_jax.models.masks import PackedMask
from qstar_jax.models.rope import LongRope, Rope

LOCAL, GLOBAL = LayerKind(Rope(10.0), window=3), LayerKind(Rope(100.0))
CONFIG = DecoderConfig(20, 16, 24, 4, 2, 4, (LOCAL, GLOBAL, LayerKind()), 64)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 9)))

# Another value of every field that is no size, and where it can be seen at once: at which fields of the parameters.
OTHERS = {
    "layers": (LOCAL, LOCAL, LayerKind()),
    "norm": "layer",
    "norm_eps": 0.1,
    "norm_placement": "sandwich",
    "parallel_residual": True,
    "qk_norm": "head",
    "activation": "gelu",
    "gated_mlp": False,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "learned_positions": True,
    "attention_scale": 1.0,
    "score_softcap": 0.5,
    "logit_softcap": 0.5,
    "embedding_scale": 3.0,
    "tie_word_embeddings": True,
}
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}
SIZES |= {"max_position_embeddings"}


# Compiled once a model and shape, whichever tests they serve.
logits_of = jax.jit(CausalLM.logits, static_argnums=0)
prefill = jax.jit(CausalLM.prefill, static_argnums=(0, 4))
extend = jax.jit(CausalLM.extend, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def shaken(model: CausalLM):
    """Random parameters in which no norm is 1 and no bias is 0."""
    params = model.init(jax.random.key(0))
    shake = lambda path, x: x + 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(1), x.size), x.shape)  # noqa: E731
    return jax.tree_util.tree_map_with_path(shake, params)


def logits(config: DecoderConfig, params=None):
    model = CausalLM("llama", config)
    return logits_of(model, shaken(model) if params is None else params, TOKENS)


@pytest.fixture(scope="module")
def plain():
    return logits(CONFIG)


def test_every_field_is_tried():
    assert {field.name for field in fields(DecoderConfig)} == set(OTHERS) | SIZES


@pytest.mark.parametrize("name", OTHERS)
def test_each_field_changes_the_logits(name, plain):
    with jax.disable_jit():  # programs that run once: their operations are compiled once for all
        actual = logits(replace(CONFIG, **{name: OTHERS[name]}))
    assert np.isfinite(actual).all() and np.abs(actual - plain).max() > 1e-2


def test_norms_of_all_heads_are_not_those_of_each():
    per_head = logits(replace(CONFIG, qk_norm="head"))
    assert np.abs(logits(replace(CONFIG, qk_norm="all")) - per_head).max() > 1e-2


def test_scales_that_are_stored_less_one_are_scales():
    params = shaken(CausalLM("llama", CONFIG))

    def less_one(path, x):
        return x - 1 if "scale" in jax.tree_util.keystr(path) else x

    actual = logits(replace(CONFIG, norm="rms_plus_one"), jax.tree_util.tree_map_with_path(less_one, params))
    np.testing.assert_allclose(actual, logits(CONFIG, params), atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_program_does_not_grow_with_depth(remat):
    def equations(jaxpr) -> int:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        values = [v for e in jaxpr.eqns for v in e.params.values()]
        inner = [x for v in values for x in (v if isinstance(v, tuple | list) else [v])]
        return len(jaxpr.eqns) + sum(equations(x) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns"))

    def sizes(layers: tuple[LayerKind, ...]) -> list[int]:
        model = CausalLM("llama", replace(CONFIG, layers=layers), ComputeOptions(remat=remat))
        total = lambda params: model.logits(params, TOKENS).sum()  # noqa: E731
        return [equations(jax.make_jaxpr(program)(model.abstract_params())) for program in (total, jax.grad(total))]

    for kinds in (CONFIG.layers, (GLOBAL,)):
        assert sizes(kinds * 2) == sizes(kinds * 6)


def test_stacked_layers_and_layers_apart_decode_the_same():
    model = CausalLM("llama", replace(CONFIG, score_softcap=2.0))
    params, lengths = shaken(model), jnp.array([6, 4])
    expected = np.asarray(logits_of(model, params, TOKENS))
    for form in (params, model.unstack(params)):
        actual, cache = prefill(model, form, TOKENS[:, :6], lengths, 4)
        np.testing.assert_allclose(actual, expected[np.arange(2), lengths - 1], atol=1e-5)
        for step in range(3):
            path = jnp.broadcast_to(jnp.arange(4) <= step, (2, 1, 4))
            tokens = TOKENS[jnp.arange(2), lengths + step][:, None]
            actual, cache = extend(model, form, cache, tokens, path, jnp.int32(step))
            np.testing.assert_allclose(actual[:, 0], expected[np.arange(2), lengths + step], atol=1e-5)


def test_windows_count_positions_when_the_pool_is_out_of_order():
    model = CausalLM("llama", CONFIG)
    stacked = shaken(model)
    expected, params = np.asarray(logits_of(model, stacked, TOKENS)), model.unstack(stacked)
    _, cache = prefill(model, params, TOKENS[:, :4], jnp.array([4, 4]), 6)
    for step in range(4):
        path = jnp.broadcast_to(jnp.arange(6) <= step, (2, 1, 6))
        _, cache = extend(model, params, cache, TOKENS[:, 4 + step][:, None], path, jnp.int32(step))
    cache = cache.reorder(jnp.broadcast_to(jnp.array([3, 1, 0, 2, 4, 5]), (2, 6)))
    path = jnp.broadcast_to(jnp.arange(6) <= 4, (2, 1, 6))
    actual, _ = extend(model, params, cache, TOKENS[:, 8][:, None], path, jnp.int32(4))
    np.testing.assert_allclose(actual[:, 0], expected[:, 8], atol=1e-5)


def test_longrope_is_not_guessed():
    scaling = LongRope((1.0, 1.0), (2.0, 3.0), original_max_position_embeddings=8, factor=4.0)
    config = replace(CONFIG, layers=(LayerKind(Rope(10.0, 1.0, scaling)),))
    params = shaken(CausalLM("llama", config))

    def logits_with(choice: str, length: int):
        model = CausalLM("llama", config, ComputeOptions(longrope=choice))
        model.check_length(length, "rows")
        return logits_of(model, params, TOKENS[:, :length])

    np.testing.assert_array_equal(logits_with("auto", 8), logits_with("short", 8))
    assert np.abs(logits_with("long", 8) - logits_with("short", 8)).max() > 1e-2
    assert np.isfinite(logits_with("long", 9)).all()
    with pytest.raises(InputError, match=r"compute\.longrope auto.*more than 8 tokens, and 9 slots"):
        CausalLM("llama", config).logits(params, TOKENS)
    with pytest.raises(InputError, match=r"compute\.longrope auto.*more than 8 tokens, and 12 slots"):
        prefill(CausalLM("llama", config), params, TOKENS[:, :6], jnp.array([6, 6]), 6)
    for choice in ("auto", "short"):
        with pytest.raises(InputError, match=r"rows: 9 tokens; beyond 8 .* set compute\.longrope to long"):
            logits_with(choice, 9)
    said = CausalLM("llama", CONFIG, ComputeOptions(longrope="long")).check_length(9, "rows")
    assert said == "compute.longrope long has no effect on this model"


def test_flops_by_hand():
    config = DecoderConfig(10, 4, 6, 2, 1, 2, (LayerKind(), LayerKind()), 16)
    # A layer: q and o 4*4 each, k and v 4*2 each, three 4*6 in the MLP: 120 weights. Context 3: 4 * 3 * 4 = 48.
    assert config.forward_flops(tokens=5, scored_tokens=3, context=3) == 5 * 2 * (2 * 120 + 48) + 3 * 2 * 4 * 10
    config = replace(config, layers=(LayerKind(), LayerKind(window=1)))
    assert config.forward_flops(tokens=5, scored_tokens=0, context=3) == 5 * (2 * 2 * 120 + 48 + 16)


def test_an_id_beyond_the_vocabulary_is_no_other_token(tiny_model, tiny_params):
    tokens, mask = jnp.array([[3, tiny_model.config.vocab_size]]), PackedMask(*jnp.zeros((2, 1, 2), int))
    hidden = tiny_model.hidden_states(tiny_params, tokens, jnp.array([[0, 1]]), mask)
    assert np.isnan(hidden[0, 1]).all()
