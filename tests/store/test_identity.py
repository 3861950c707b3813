import copy
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.decoder_config import LayerKind
from qstar_jax.models.rope import LongRope, Rope
from qstar_jax.store.identity import (
    check_identity,
    examples_identity,
    identity_file,
    tokenizer_identity,
    write_identity,
)
from qstar_jax.store.open import LoadedModel


def test_a_tokenizer_is_itself_after_a_round_trip_and_after_use(tiny_tokenizer, tmp_path):
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

    found = {
        tokenizer_identity(tiny_tokenizer),
        changed(lambda tokenizer: tokenizer.add_tokens(["new"])),
        changed(lambda tokenizer: setattr(tokenizer, "eos_token", "[UNK]")),
        changed(lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}")),
        changed(lambda tokenizer: setattr(tokenizer, "chat_template", {"default": "{{ messages }}", "tools": "x"})),
        changed(without_bos),
    }
    assert len(found) == 6


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
    output, given = tmp_path / "found.jsonl", {"model": {"parameters": "a" * 64, "config": {"layers": 2}}, "beta": None}

    def refused(identity):
        with pytest.raises(InputError) as error:
            check_identity(output, identity, holds="answers", fix="choose another --out")
        return str(error.value)

    assert "found.identity.json is missing" in refused(given) and "choose another --out" in refused(given)
    write_identity(output, given)
    check_identity(output, given, holds="answers", fix="")
    other = given | {"model": {"parameters": "b" * 64, "config": {"layers": 2}}}
    assert "answers made with model.parameters aaaaaaaaaaaa..., and it is bbbbbbbbbbbb... now (other w" in refused(
        other
    )
    other = given | {"model": {"parameters": "a" * 64, "config": {"layers": 3}}}
    assert "model.config.layers 2, and it is 3 now; choose another --out" in refused(other)
    assert "beta None, and it is 0.1 now" in refused(given | {"beta": 0.1})
    for text in ("{", "[]", ""):
        identity_file(output).write_text(text)
        assert "not readable as the identity of found.jsonl" in refused(given)
