import json
import os
import subprocess

import pytest
from tokenizers import Tokenizer, models, normalizers

from qstar_jax.errors import InputError
from qstar_jax.store import hub

TEMPLATES = {
    "default": "{% for m in messages %}{{ m.content }} {% endfor %}",
    "tool_use": "{{ tools }}{% for m in messages %}{{ m.content }} {% endfor %}",
}


@pytest.fixture
def tokenizer(tiny_tokenizer, hf_folder):
    """One with several chat templates and a special token of its own."""
    tokenizer = hub.read_tokenizer(hf_folder)
    tokenizer.chat_template = dict(TEMPLATES)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    return tokenizer


def test_all_chat_templates_travel(tokenizer):
    files = hub.tokenizer_files(tokenizer)
    assert files["additional_chat_templates/tool_use.jinja"] == TEMPLATES["tool_use"]
    again = hub.build_tokenizer(files)
    assert again.chat_template == TEMPLATES and again("w3 w7").input_ids == tokenizer("w3 w7").input_ids


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt"])
def test_files_cannot_leave_their_folder(name, tokenizer):
    with pytest.raises(InputError, match="expected paths inside its folder"):
        hub.build_tokenizer(hub.tokenizer_files(tokenizer) | {name: "x"})


def test_nothing_is_written_that_one_version_alone_knows(tokenizer, tmp_path):
    hub.write_tokenizer(tmp_path, tokenizer)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["w7"] and "extra_special_tokens" not in config
    assert not {"backend", "is_local", "local_files_only"} & config.keys()


def test_tokens_stay_the_same_where_a_class_mends_the_file(tmp_path):
    """What transformers 5 reads as LlamaTokenizer and saves as such, it reads with other tokens behind special ones."""
    model = models.BPE({"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "▁a": 4}, [("▁", "a")])
    rust = Tokenizer(model)
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.add_special_tokens(["<s>", "</s>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = hub.read_tokenizer(tmp_path)
    again = hub.build_tokenizer(hub.tokenizer_files(tokenizer))
    for text in ("a a", "a</s>a", " a</s> a", "<s>a"):
        assert again(text).input_ids == tokenizer(text).input_ids, text


@pytest.mark.slow
@pytest.mark.skipif("QSTAR_TRANSFORMERS4" not in os.environ, reason="names a Python that has transformers 4")
def test_transformers_4_reads_the_same(tokenizer, tmp_path):
    hub.write_tokenizer(tmp_path, tokenizer)
    code = f"""
import json, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
t = transformers.AutoTokenizer.from_pretrained({str(tmp_path)!r})
print(json.dumps([t("w3 w7 nothing").input_ids, t.eos_token_id, t.pad_token_id, t.all_special_ids, t.chat_template]))
"""
    words = [os.environ["QSTAR_TRANSFORMERS4"], "-c", code]
    said = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": ""})
    ids, eos, pad, special, templates = json.loads(said.stdout.splitlines()[-1])
    assert ids == tokenizer("w3 w7 nothing").input_ids and (eos, pad) == (2, 0)
    assert sorted(special) == sorted(tokenizer.all_special_ids) and templates == TEMPLATES
