import copy
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.data.identity import examples_identity, tokenizer_identity
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.decoder_config import LayerKind
from qstar_jax.models.rope import LongRope, Rope
from qstar_jax.sharding import make_mesh, tree_shardings
from qstar_jax.store.identity import (
    _checksums,
    check_identity,
    identity_file,
    params_identity,
    write_identity,
)
from qstar_jax.store.open import LoadedModel


def test_a_token_that_moves_from_prompt_to_response_changes_the_identity():
    def identity(prompt, response):
        return examples_identity([Example(np.array(prompt), False, (Response(np.array(response), False),), row=0)])

    assert identity([1, 2], [3])["rows"] == 1
    assert identity([1, 2], [3]) == identity([1, 2], [3]) != identity([1], [2, 3])


def test_a_tokenizer_keeps_its_identity_after_a_round_trip_and_after_use(tiny_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    before = tokenizer_identity(tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_identity(again) == before
    again("w1 w2 w3 w4", truncation=True, max_length=2, padding="max_length")
    assert tokenizer_identity(again) == before


def test_whatever_changes_the_ids_changes_the_tokenizer(tiny_tokenizer):
    from tokenizers import processors

    def changed(how):
        other = copy.deepcopy(tiny_tokenizer)
        how(other)
        return tokenizer_identity(other)

    def without_bos(tokenizer):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])

    identities = {
        tokenizer_identity(tiny_tokenizer),
        changed(lambda tokenizer: tokenizer.add_tokens(["new"])),
        changed(lambda tokenizer: setattr(tokenizer, "eos_token", "[UNK]")),
        changed(lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}")),
        changed(lambda tokenizer: setattr(tokenizer, "chat_template", {"default": "{{ messages }}", "tools": "x"})),
        changed(without_bos),
    }
    assert len(identities) == 6


def test_a_model_is_its_weights_shape_and_tokenizer(tiny_model, tiny_params, tiny_tokenizer, tmp_path):
    loaded = LoadedModel(tiny_model, tiny_params, tiny_tokenizer, tmp_path)
    identity = loaded.identity()
    assert json.loads(json.dumps(identity)) == identity  # nothing in it that JSON would change
    assert replace(loaded, source=tmp_path / "moved", params=jax.device_get(tiny_params)).identity() == identity
    layers = tuple(replace(kind, rope=Rope(5e5)) for kind in tiny_model.config.layers)
    config = replace(tiny_model.config, layers=layers)
    other = replace(loaded, model=replace(tiny_model, config=config)).identity()
    assert {name for name in identity if identity[name] != other[name]} == {"config"}
    scaling = LongRope((1.0,) * 4, (2.0,) * 4, original_max_position_embeddings=8, factor=4.0)
    config = replace(config, layers=(LayerKind(Rope(1e4, 1.0, scaling)),))
    phi = CausalLM("phi3", config), CausalLM("phi3", config, ComputeOptions(longrope="long"))
    short, long = (replace(loaded, model=model).identity() for model in phi)
    assert {name for name in short if short[name] != long[name]} == {"config"}
    scale = jax.tree.map(lambda x: x, tiny_params)
    scale["norm"]["scale"] = np.asarray(scale["norm"]["scale"]) + np.float32(1e-6) * np.eye(1, 32, 7, dtype="f")[0]
    other = replace(loaded, params=scale).identity()
    assert {name for name in identity if identity[name] != other[name]} == {"parameters"}


def test_examples_are_told_apart_by_tokens_and_order(random_examples):
    examples = random_examples(5)
    identity = examples_identity(examples)
    assert identity["rows"] == 5
    assert examples_identity([replace(e, row=e.row + 3) for e in examples]) == identity
    assert examples_identity(examples[::-1])["sha256"] != identity["sha256"]
    swapped = [replace(examples[0], responses=examples[0].responses[::-1]), *examples[1:]]
    assert examples_identity(swapped)["sha256"] != identity["sha256"]


def test_a_difference_is_named_with_both_values_and_the_fix(tmp_path):
    output, recorded = (
        tmp_path / "rows.jsonl",
        {"model": {"parameters": "a" * 64, "config": {"layers": 2}}, "beta": None},
    )

    def refused(identity):
        with pytest.raises(InputError) as error:
            check_identity(output, identity, holds="responses", fix="choose another --out")
        return str(error.value)

    assert "rows.identity.json is missing" in refused(recorded) and "choose another --out" in refused(recorded)
    write_identity(output, recorded)
    check_identity(output, recorded, holds="responses", fix="")
    other = recorded | {"model": {"parameters": "b" * 64, "config": {"layers": 2}}}
    assert "responses made with model.parameters aaaaaaaaaaaa..., and it is bbbbbbbbbbbb... now (other w" in refused(
        other
    )
    other = recorded | {"model": {"parameters": "a" * 64, "config": {"layers": 3}}}
    assert "model.config.layers 2, and it is 3 now; choose another --out" in refused(other)
    assert "beta None, and it is 0.1 now" in refused(recorded | {"beta": 0.1})
    for text in ("{", "[]", ""):
        identity_file(output).write_text(text)
        assert "not readable as the identity of rows.jsonl" in refused(recorded)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "embed": {"embedding": jax.random.normal(keys[0], (24, 16))},
        "layers": {"kernel": jax.random.normal(keys[1], (3, 16, 8)).astype(jnp.bfloat16)},
        "norm": {"scale": jax.random.normal(keys[2], (16,)).astype(jnp.bfloat16), "bias": jnp.float32(0.5)},
    }


@pytest.mark.parametrize("options", [MeshOptions(fsdp=8, data=1), MeshOptions(2, 2, 2), MeshOptions(data=8)], ids=str)
def test_parameters_have_one_identity_on_every_mesh(params, options):
    options = replace(options, min_shard_size=0)
    shardings = tree_shardings(params, make_mesh(options), options)
    sharded = jax.device_put(params, shardings)
    shards = {shard.data.shape for shard in sharded["embed"]["embedding"].addressable_shards}
    assert (shards == {(24, 16)}) == (options.data == 8)  # or this would test nothing
    assert params_identity(sharded) == params_identity(params) == params_identity(jax.device_get(params))


def test_only_scalars_leave_the_devices(params):
    mesh = make_mesh(MeshOptions(data=1, fsdp=8))
    x = jax.device_put(params["embed"]["embedding"], NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    program = _checksums.lower(x).compile()
    assert [out.shape for out in program.out_info] == [(), ()]
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", program.as_text())
    assert all(np.prod([int(n) for n in shape.split(",") if n]) <= 8 for shape in gathered)
    assert program.memory_analysis().temp_size_in_bytes < 1000  # hashes are not stored: the shard alone has 192 B


def flipped(x, index, bit=0):
    raw = np.asarray(x).copy()
    raw.view({2: np.uint16, 4: np.uint32}[raw.dtype.itemsize])[index] ^= 1 << bit
    return jnp.asarray(raw)


@pytest.mark.parametrize(
    ("path", "last"),
    [(("embed", "embedding"), (23, 15)), (("layers", "kernel"), (2, 15, 7)), (("norm", "scale"), (15,))],
    ids=["float32 matrix", "bfloat16 stack", "bfloat16 vector"],
)
def test_identity_changes_with_each_bit_and_each_swap(params, path, last):
    def identity_with(leaf):
        return params_identity(params | {path[0]: params[path[0]] | {path[1]: leaf}})

    x = params[path[0]][path[1]]
    assert identity_with(x) == params_identity(params)
    first = (0,) * len(last)
    bits = 8 * x.dtype.itemsize
    variants = [flipped(x, index, bit) for index in (first, last) for bit in (0, bits - 2, bits - 1)]
    variants.append(x.at[first].set(x[last]).at[last].set(x[first]))
    for axis in range(len(last)):
        neighbour = tuple(int(i == axis) for i in range(len(last)))
        variants.append(x.at[first].set(x[neighbour]).at[neighbour].set(x[first]))
    if len(last) > 1:  # the sums of their indices are the same
        a, b = (*first[:-2], 0, 1), (*first[:-2], 1, 0)
        variants.append(x.at[a].set(x[b]).at[b].set(x[a]))
    variants.append(x[::-1])
    negated = x.at[first].set(-x[last])  # sums with odd weights do not see a swap of these
    variants += [negated, negated.at[first].set(negated[last]).at[last].set(negated[first])]
    identities = [identity_with(v) for v in variants]
    assert len({params_identity(params), *identities}) == 1 + len(variants)


def test_identity_takes_names_shapes_and_dtypes():
    zeros = jnp.zeros((2, 4))
    trees = [
        {"a": zeros, "b": zeros + 1},
        {"a": zeros + 1, "b": zeros},
        {"a": zeros, "c": zeros + 1},
        {"a": zeros.T, "b": zeros + 1},
        {"a": jnp.zeros((2, 4), jnp.bfloat16), "b": zeros + 1},
        {"a": -zeros, "b": zeros + 1},
        {"a": zeros},
        {"a": zeros[:0]},
        {"a": zeros[:, :0]},
        {"a": {"b": zeros}},
    ]
    assert len({params_identity(tree) for tree in trees}) == len(trees)
