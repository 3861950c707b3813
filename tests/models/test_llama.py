"""Parity with torch transformers (the oracle), and what must hold without any oracle."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import hub
from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.loading import param_shardings
from qstar_jax.models import CausalLM
from qstar_jax.models.decoder_config import DecoderConfig, LayerKind
from qstar_jax.models.masks import left_padded, right_padded

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "one key a query": {"num_key_value_heads": 4},
    "one key for all": {"num_key_value_heads": 1},
    "llama3 scaling": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "wide heads": {"head_dim": 12},
}

# Compiled once a model and shape, whichever tests they serve.
logits_of = jax.jit(CausalLM.logits, static_argnums=0)
hidden_states_of = jax.jit(CausalLM.hidden_states, static_argnums=0)
prefill = jax.jit(CausalLM.prefill, static_argnums=(0, 4))
extend = jax.jit(CausalLM.extend, static_argnums=0)


def torch_model(torch, tiny_config, **changes):
    """A small random torch Llama whose every part bears on the logits."""
    import transformers

    torch.manual_seed(0)
    config = {name: value for name, value in tiny_config.items() if name not in ("architectures", "model_type")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.2 if "norm" in name else 0.1))
    return model


def read(folder, mesh, compute=ComputeOptions()):
    model = CausalLM.from_hf(hub.read_config(folder), compute)
    return model, hub.read_params(folder, model, param_shardings(model, mesh, MeshOptions()))


@pytest.fixture(scope="module")
def tokens():
    # Longer than the 16 positions of the original context in LLAMA3, so that every branch of the scaling is met.
    return np.random.default_rng(0).integers(0, 60, (3, 40))


@pytest.mark.parity
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_those_of_torch(changes, tiny_config, tokens, tmp_path, one_device):
    torch = pytest.importorskip("torch")
    oracle = torch_model(torch, tiny_config, **changes)
    oracle.save_pretrained(tmp_path)
    model, params = read(tmp_path, one_device)
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    assert expected.std() > 0.1  # flat logits would agree with anything
    found = logits_of(model, params, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parity
def test_files_in_shards_and_in_bfloat16(tiny_config, tokens, tmp_path, one_device):
    torch = pytest.importorskip("torch")
    oracle = torch_model(torch, tiny_config).to(torch.bfloat16)
    oracle.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 2
    model, params = read(tmp_path, one_device)
    # Read anew in float32: `.to(bfloat16)` has rounded the rotary frequencies too, which are no part of the file.
    again = type(oracle).from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = again(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, params, jnp.asarray(tokens)), expected, rtol=0, atol=1e-4)
    # Stored in bfloat16, the values must be exactly those of the file.
    _, params = read(tmp_path, one_device, ComputeOptions(param_dtype="bfloat16"))
    table = params["embed"]["embedding"]
    assert table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(table, np.float32), oracle.model.embed_tokens.weight.detach().float().numpy()
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", ["tied", "llama3 scaling", "linear scaling", "wide heads"])
def test_written_folders_are_read_by_torch(name, tiny_config, tiny_tokenizer, tokens, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model = CausalLM.from_hf(tiny_config | VARIANTS[name])
    params = jax.jit(model.init)(jax.random.key(0))
    hub.write_folder(tmp_path, model, params, tiny_tokenizer, "float32")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, params, jnp.asarray(tokens)), expected, rtol=0, atol=1e-4)


def full(model, params, tokens):
    layout = right_padded(jnp.full(len(tokens), tokens.shape[1]), tokens.shape[1])
    return hidden_states_of(model, params, tokens, *layout)


# Three branches behind each prompt, as (slot, its past's slots): 0-1-4, 0-2-5 and 0-3, put in by three calls.
CALLS = [(0, [[]]), (1, [[0], [0], [0]]), (4, [[0, 1], [0, 2]])]


def decode(model, params, prompts, lengths, pool, *, width=8, reorder=None, mask=lambda path: path):
    """Logits of what follows the prompts [B, V] and each of the pool's tokens [B, M, V], by prefill and extend."""
    rows, slots = pool.shape
    prompts = jnp.pad(prompts, ((0, 0), (0, width - prompts.shape[1])), constant_values=3)
    first, cache = prefill(model, params, prompts, lengths, slots)
    found = []
    for slot, pasts in CALLS:
        path = np.zeros((rows, len(pasts), slots), bool)
        for k, past in enumerate(pasts):
            path[:, k, [*past, slot + k]] = True
        tokens = pool[:, slot : slot + len(pasts)]
        logits, cache = extend(model, params, cache, tokens, jnp.asarray(mask(path)), jnp.int32(slot))
        found.append(logits)
        if reorder is not None:
            cache = cache.reorder(jnp.broadcast_to(jnp.asarray(reorder), (rows, slots)))
    return first, jnp.concatenate(found, axis=1)


def texts_of(prompts, lengths, pool):
    """The text that ends in each slot of `CALLS`: the oracle's reading of the masks. [(row, slot, text)]."""
    pasts = [past for _, calls in CALLS for past in calls]
    return [
        (row, slot, [*prompts[row, : lengths[row]].tolist(), *(int(pool[row, i]) for i in [*past, slot])])
        for row in range(len(pool))
        for slot, past in enumerate(pasts)
    ]


@pytest.fixture(scope="module")
def branches(tiny_model, tiny_params, tokens):
    """Prompts of three lengths, tokens of their pools, and the logits [B, M, V] that full passes have for them."""
    prompts, lengths, pool = tokens[:, :7], np.array([7, 1, 4]), tokens[:, 20:26]
    texts = texts_of(prompts, lengths, pool)
    rows = np.zeros((len(texts), 10), np.int32)
    for line, (_, _, text) in zip(rows, texts, strict=True):
        line[: len(text)] = text
    ends = np.array([len(text) for _, _, text in texts])
    logits = np.asarray(logits_of(tiny_model, tiny_params, jnp.asarray(rows), jnp.asarray(ends)))
    expected = logits[np.arange(len(texts)), ends - 1].reshape(3, 6, -1)
    return jnp.asarray(prompts), jnp.asarray(lengths), jnp.asarray(pool), expected


@pytest.mark.parametrize("stacked", [True, False])
def test_decoding_with_a_cache_equals_the_full_pass(stacked, tiny_model, tiny_params, branches):
    prompts, lengths, pool, expected = branches
    params = tiny_params if stacked else tiny_model.unstack(tiny_params)
    first, found = decode(tiny_model, params, prompts, lengths, pool)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    full_pass = logits_of(tiny_model, tiny_params, prompts, lengths)
    last = np.asarray(full_pass)[np.arange(3), np.asarray(lengths) - 1]
    np.testing.assert_allclose(first, last, rtol=0, atol=1e-5)
    # Without the masks, every branch sees the others too: the comparison above would notice.
    _, mixed = decode(tiny_model, params, prompts, lengths, pool, mask=lambda path: path.any(1, keepdims=True) | path)
    assert np.abs(np.asarray(mixed - expected)[:, 1:]).max() > 0.01


def test_a_pool_that_is_moved_must_be_read_at_its_new_places(tiny_model, tiny_params, branches):
    prompts, lengths, pool, expected = branches
    _, still = decode(tiny_model, tiny_params, prompts, lengths, pool, reorder=np.arange(6))
    np.testing.assert_allclose(still, expected, rtol=0, atol=1e-5)
    # Slots 1 and 2 change places after each call: of the last call's branches, each then follows the other's past.
    _, moved = decode(tiny_model, tiny_params, prompts, lengths, pool, reorder=np.array([0, 2, 1, 3, 4, 5]))
    np.testing.assert_allclose(moved[:, :4], expected[:, :4], rtol=0, atol=1e-5)
    swapped = pool.at[:, 1].set(pool[:, 2]).at[:, 2].set(pool[:, 1])
    _, other = decode(tiny_model, tiny_params, prompts, lengths, swapped)
    np.testing.assert_allclose(moved[:, 4:], other[:, 4:], rtol=0, atol=1e-5)
    assert np.abs(np.asarray(moved - expected)[:, 4:]).max() > 0.01


def test_unstacking_keeps_every_weight(tiny_model, tiny_params):
    unstacked = tiny_model.unstack(tiny_params)
    assert list(unstacked["layers"]) == [0, 1] and tiny_model.unstack(unstacked) is unstacked
    for i, layer in unstacked["layers"].items():
        jax.tree.map(lambda x, own, i=i: np.testing.assert_array_equal(x[i], own), tiny_params["layers"], layer)
    assert all(unstacked[name] is tiny_params[name] for name in unstacked if name != "layers")


@pytest.mark.parametrize("rubbish", [0, 59])
def test_padding_on_either_side_changes_no_valid_position(tiny_model, tiny_params, tokens, rubbish):
    lengths, width = np.array([7, 1, 10]), 10
    rows = [jnp.asarray(tokens[i : i + 1, :n]) for i, n in enumerate(lengths)]
    right, left = np.full((3, width), rubbish), np.full((3, width), rubbish)
    for i, n in enumerate(lengths):
        right[i, :n], left[i, width - n :] = rows[i][0], rows[i][0]
    from_right = hidden_states_of(
        tiny_model, tiny_params, jnp.asarray(right), *right_padded(jnp.asarray(lengths), width)
    )
    from_left = hidden_states_of(tiny_model, tiny_params, jnp.asarray(left), *left_padded(jnp.asarray(lengths), width))
    assert np.isfinite(from_right).all() and np.isfinite(from_left).all()
    for i, n in enumerate(lengths):
        alone = full(tiny_model, tiny_params, rows[i])[0]
        np.testing.assert_allclose(from_right[i, :n], alone, rtol=0, atol=1e-5)
        np.testing.assert_allclose(from_left[i, width - n :], alone, rtol=0, atol=1e-5)


def test_logits_of_right_padded_rows_ignore_what_follows(tiny_model, tiny_params, tokens):
    rows = jnp.asarray(tokens[:2, :6])
    expected = logits_of(tiny_model, tiny_params, rows)
    assert expected.shape == (2, 6, 60) and expected.dtype == jnp.float32
    found = logits_of(tiny_model, tiny_params, rows.at[0, 4:].set(9), jnp.array([4, 6]))
    np.testing.assert_allclose(found[0, :4], expected[0, :4], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)


def loss_of(model, tokens):
    return lambda params: (model.logits(params, tokens) ** 2).mean()


def test_rematerialisation_changes_no_gradient_but_the_program(tiny_config, tiny_params, tokens):
    found, programs = {}, {}
    for remat in ("none", "dots", "attention", "full"):
        model = CausalLM.from_hf(tiny_config, ComputeOptions(remat=remat))
        grad = jax.grad(loss_of(model, jnp.asarray(tokens[:, :8])))
        found[remat] = jax.jit(grad)(tiny_params)
        programs[remat] = str(jax.make_jaxpr(grad)(tiny_params))
    for remat in ("dots", "attention", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max() + 1)),
            found[remat],
            found["none"],
        )
    assert len(set(programs.values())) == 4 and "checkpoint" not in programs["none"]


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_are_those_that_are_asked_for(tiny_config, param_dtype, dtype):
    model = CausalLM.from_hf(tiny_config, ComputeOptions(param_dtype=param_dtype, dtype=dtype))
    params = model.abstract_params()
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    tokens = jnp.zeros((1, 4), jnp.int32)
    arguments = (params, tokens, *right_padded(jnp.array([4]), 4))
    assert jax.eval_shape(model.hidden_states, *arguments).dtype == jnp.dtype(dtype)
    assert jax.eval_shape(model.head, params).table.dtype == jnp.dtype(dtype)
    assert jax.eval_shape(model.logits, params, tokens).dtype == jnp.float32
    start = jax.eval_shape(lambda *x: model.prefill(*x, slots=3), params, tokens, jnp.array([4]))
    path = jnp.ones((1, 1, 3), bool)
    next_one = jax.eval_shape(model.extend, params, start[1], tokens[:, :1], path, jnp.int32(0))
    for logits, cache in (start, next_one):
        assert logits.dtype == jnp.float32
        assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype(dtype)}


def equations(jaxpr) -> int:
    """Equations of a program, those of its inner programs too."""
    count = 0
    for equation in jaxpr.eqns:
        count += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                count += equations(inner) if hasattr(inner, "eqns") else 0
    return count


def test_the_program_does_not_grow_with_depth(tiny_config):
    def sizes(layers):
        model = CausalLM.from_hf(tiny_config | {"num_hidden_layers": layers})
        params, tokens = model.abstract_params(), jnp.zeros((2, 8), jnp.int32)
        forward = jax.make_jaxpr(model.logits)(params, tokens)
        backward = jax.make_jaxpr(jax.grad(loss_of(model, tokens)))(params)
        return [equations(program.jaxpr) for program in (forward, backward)]

    assert sizes(2) == sizes(6)


def test_layers_differ_from_each_other(tiny_model):
    # One key for all layers would start them as copies.
    kernel = jax.jit(tiny_model.init)(jax.random.key(0))["layers"]["mlp"]["up"]["kernel"]
    assert kernel.shape[0] == 2 and not np.allclose(kernel[0], kernel[1])


def test_models_are_hashable_and_equal_by_value(tiny_config, tiny_model):
    assert hash(CausalLM.from_hf(tiny_config)) == hash(tiny_model) and CausalLM.from_hf(tiny_config) == tiny_model
    assert replace(tiny_model, compute=ComputeOptions(dtype="bfloat16")) != tiny_model


@pytest.mark.parametrize("name", VARIANTS)
def test_config_survives_writing_and_reading(name, tiny_config):
    model = CausalLM.from_hf(tiny_config | VARIANTS[name])
    assert CausalLM.from_hf(model.to_hf()) == model


def test_both_places_of_theta_are_read(tiny_config):
    old = tiny_config | {"rope_theta": 500.0}
    new = {k: v for k, v in tiny_config.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    assert CausalLM.from_hf(old) == CausalLM.from_hf(new)
    assert [rope.theta for rope in CausalLM.from_hf(new).config.ropes] == [500.0]


def test_every_parameter_has_its_tensor(tiny_model):
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tiny_model.abstract_params())
    }
    assert paths == set(tiny_model.tensors)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba", "architectures": ["MambaLM"]}, r"model_type 'mamba'.*MambaLM.*known: .*llama"),
        ({"model_type": None}, r"model_type None"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; built are silu"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "'ntk'; expected default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}}, "has no high_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.7}}, r"has mscale 0\.7, which is not built"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope_theta .*500000\.0, rope_theta 10000\.0",
        ),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "rope_parameters .* differ"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "differ"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'; expected a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "method 'gptq'.*quantised.*dequantise"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map names code"),
        ({"sliding_window": 4096}, "sliding_window is 4096, a key that is not known"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0"),
        ({"embedding_multiplier": 12.0}, r"embedding_multiplier is 12\.0"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"num_key_value_heads": 3}, "3 num_key_value_heads do not divide 4"),
        ({"hidden_size": 30}, "4 num_attention_heads do not divide hidden_size 30"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; expected a whole number"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes, named, tiny_config):
    with pytest.raises(InputError, match=named):
        CausalLM.from_hf(tiny_config | changes)


def test_keys_that_change_nothing_are_passed_over(tiny_config, tiny_model):
    harmless = {
        "_name_or_path": "x/y",
        "transformers_version": "5.1",
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.1,
        "eos_token_id": [1, 2],
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_scaling": None,
        "hidden_act": "swish",
        "auto_map": {"AutoTokenizer": ["x.Y", None]},
    }
    assert CausalLM.from_hf(tiny_config | harmless) == tiny_model


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_missing_keys_are_named(key, tiny_config):
    with pytest.raises(InputError, match=f"no key '{key}'"):
        CausalLM.from_hf({name: value for name, value in tiny_config.items() if name != key})


def test_lengths_beyond_the_positions(tiny_model):
    assert tiny_model.check_length(256, "rows") is None
    said = tiny_model.check_length(1257, "rows")
    assert said.startswith("warning: rows: 1,257 tokens, and the model was made for 256")
    learned = replace(tiny_model, config=replace(tiny_model.config, learned_positions=True))
    assert learned.check_length(256, "rows") is None
    with pytest.raises(InputError, match=r"rows: 257 tokens.*256.*no positions beyond"):
        learned.check_length(257, "rows")


def test_flops_by_hand():
    config = DecoderConfig(10, 4, 6, 2, 1, 2, (LayerKind(), LayerKind()), 16)
    # A layer: q and o 4*4 each, k and v 4*2 each, three 4*6 in the MLP: 120 weights. Context 3: 4 * 3 * 4 = 48.
    assert config.forward_flops(tokens=5, scored_tokens=3, context=3) == 5 * 2 * (2 * 120 + 48) + 3 * 2 * 4 * 10
    config = replace(config, layers=(LayerKind(), LayerKind(window=1)))
    assert config.forward_flops(tokens=5, scored_tokens=0, context=3) == 5 * (2 * 2 * 120 + 48 + 16)
