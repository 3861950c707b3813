"""What must hold of a model without any oracle: caches, padding, types, the two forms of its parameters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.masks import right_padded
from qstar_jax.plan.hlo import Module

# Compiled once a model and shape, whichever tests they serve.
logits_of = jax.jit(CausalLM.logits, static_argnums=0)
hidden_states_of = jax.jit(CausalLM.hidden_states, static_argnums=0)
prefill = jax.jit(CausalLM.prefill, static_argnums=(0, 4))
extend = jax.jit(CausalLM.extend, static_argnums=0)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 60, (3, 40))


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
    actual = []
    for slot, pasts in CALLS:
        path = np.zeros((rows, len(pasts), slots), bool)
        for k, past in enumerate(pasts):
            path[:, k, [*past, slot + k]] = True
        tokens = pool[:, slot : slot + len(pasts)]
        logits, cache = extend(model, params, cache, tokens, jnp.asarray(mask(path)), jnp.int32(slot))
        actual.append(logits)
        if reorder is not None:
            cache = cache.reorder(jnp.broadcast_to(jnp.asarray(reorder), (rows, slots)))
    return first, jnp.concatenate(actual, axis=1)


def texts_of(prompts, lengths, pool):
    """The text that ends in each slot of `CALLS`: the oracle's reading of the masks. [(row, slot, text)]."""
    pasts = [past for _, calls in CALLS for past in calls]
    return [
        (row, slot, [*prompts[row, : lengths[row]].tolist(), *(int(pool[row, i]) for i in [*past, slot])])
        for row in range(len(pool))
        for slot, past in enumerate(pasts)
    ]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def policy(request, families, tiny_model, tiny_params):
    """(model, params): one without and one with windows, that prompts and paths outgrow, and caps."""
    if request.param == "llama":
        return tiny_model, tiny_params
    model = CausalLM.from_hf(families.FAMILIES[request.param].config)
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def branches(policy, tokens):
    """Prompts of three lengths, tokens of their pools, and the logits [B, M, V] that full passes have for them."""
    prompts, lengths, pool = tokens[:, :7], np.array([7, 1, 4]), tokens[:, 20:26]
    texts = texts_of(prompts, lengths, pool)
    rows = np.zeros((len(texts), 10), np.int32)
    for line, (_, _, text) in zip(rows, texts, strict=True):
        line[: len(text)] = text
    ends = np.array([len(text) for _, _, text in texts])
    logits = np.asarray(logits_of(*policy, jnp.asarray(rows), jnp.asarray(ends)))
    expected = logits[np.arange(len(texts)), ends - 1].reshape(3, 6, -1)
    return jnp.asarray(prompts), jnp.asarray(lengths), jnp.asarray(pool), expected


@pytest.mark.parametrize("stacked", [True, False])
def test_decoding_with_a_cache_equals_the_full_pass(stacked, policy, branches):
    (model, params), (prompts, lengths, pool, expected) = policy, branches
    form = params if stacked else model.unstack(params)
    first, actual = decode(model, form, prompts, lengths, pool)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    full_pass = logits_of(model, params, prompts, lengths)
    last = np.asarray(full_pass)[np.arange(3), np.asarray(lengths) - 1]
    np.testing.assert_allclose(first, last, rtol=0, atol=1e-5)
    # Without the masks, every branch sees the others too: the comparison above would notice.
    _, mixed = decode(model, form, prompts, lengths, pool, mask=lambda path: path.any(1, keepdims=True) | path)
    assert np.abs(np.asarray(mixed - expected)[:, 1:]).max() > 0.01


def test_a_pool_that_is_moved_must_be_read_at_its_new_places(policy, branches):
    prompts, lengths, pool, expected = branches
    _, still = decode(*policy, prompts, lengths, pool, reorder=np.arange(6))
    np.testing.assert_allclose(still, expected, rtol=0, atol=1e-5)
    # Slots 1 and 2 change places after each call: of the last call's branches, each then follows the other's past.
    _, moved = decode(*policy, prompts, lengths, pool, reorder=np.array([0, 2, 1, 3, 4, 5]))
    np.testing.assert_allclose(moved[:, :4], expected[:, :4], rtol=0, atol=1e-5)
    swapped = pool.at[:, 1].set(pool[:, 2]).at[:, 2].set(pool[:, 1])
    _, other = decode(*policy, prompts, lengths, swapped)
    np.testing.assert_allclose(moved[:, 4:], other[:, 4:], rtol=0, atol=1e-5)
    assert np.abs(np.asarray(moved - expected)[:, 4:]).max() > 0.01


def test_unstacking_keeps_every_weight(tiny_model, tiny_params):
    unstacked = tiny_model.unstack(tiny_params)
    assert list(unstacked["layers"]) == [0, 1] and tiny_model.unstack(unstacked) is unstacked
    for i, layer in unstacked["layers"].items():
        jax.tree.map(lambda x, own, i=i: np.testing.assert_array_equal(x[i], own), tiny_params["layers"], layer)
    assert all(unstacked[name] is tiny_params[name] for name in unstacked if name != "layers")


@pytest.mark.parametrize("rubbish", [0, 59])
def test_padding_on_either_side_changes_no_valid_position(tiny_model, tiny_params, tokens, rubbish, left_padded):
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
    actual = logits_of(tiny_model, tiny_params, rows.at[0, 4:].set(9), jnp.array([4, 6]))
    np.testing.assert_allclose(actual[0, :4], expected[0, :4], rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual[1], expected[1], rtol=0, atol=1e-5)


def loss_of(model, tokens):
    return lambda params: (model.logits(params, tokens) ** 2).mean()


def test_rematerialisation_changes_no_gradient_but_the_program(tiny_config, tiny_params, tokens):
    actual, programs = {}, {}
    for remat in ("none", "dots", "attention", "full"):
        model = CausalLM.from_hf(tiny_config, ComputeOptions(remat=remat))
        grad = jax.grad(loss_of(model, jnp.asarray(tokens[:, :8])))
        actual[remat] = jax.jit(grad)(tiny_params)
        programs[remat] = str(jax.make_jaxpr(grad)(tiny_params))
    for remat in ("dots", "attention", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max() + 1)),
            actual[remat],
            actual["none"],
        )
    assert len(set(programs.values())) == 4 and "checkpoint" not in programs["none"]


def test_layers_without_a_loop_train_the_same(tiny_config, tiny_params, tokens, assert_norm_close):
    grads, loops = {}, {}
    for scan_layers in (True, False):
        model = CausalLM.from_hf(tiny_config, ComputeOptions(scan_layers=scan_layers))
        compiled = jax.jit(jax.grad(loss_of(model, jnp.asarray(tokens[:, :8])))).lower(tiny_params).compile()
        grads[scan_layers] = compiled(tiny_params)
        loops[scan_layers] = [loop.trips for loop in Module.parse(compiled.as_text()).loops]
    assert_norm_close(grads[False], grads[True], 1e-6)
    assert tiny_config["num_hidden_layers"] in loops[True] and tiny_config["num_hidden_layers"] not in loops[False]


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


def test_layers_differ_from_each_other(tiny_model):
    # One key for all layers would start them as copies.
    kernel = jax.jit(tiny_model.init)(jax.random.key(0))["layers"]["mlp"]["up"]["kernel"]
    assert kernel.shape[0] == 2 and not np.allclose(kernel[0], kernel[1])


def test_models_are_hashable_and_equal_by_value(tiny_config, tiny_model):
    assert hash(CausalLM.from_hf(tiny_config)) == hash(tiny_model) and CausalLM.from_hf(tiny_config) == tiny_model
    assert replace(tiny_model, compute=ComputeOptions(dtype="bfloat16")) != tiny_model


def test_lengths_beyond_the_positions(tiny_model):
    assert tiny_model.check_length(256, "rows") is None
    warning = tiny_model.check_length(1257, "rows")
    assert warning.startswith("warning: rows: 1,257 tokens exceed the model's context of 256")
    learned = replace(tiny_model, config=replace(tiny_model.config, learned_positions=True))
    assert learned.check_length(256, "rows") is None
    with pytest.raises(InputError, match=r"rows: 257 tokens.*256.*no positions beyond"):
        learned.check_length(257, "rows")
