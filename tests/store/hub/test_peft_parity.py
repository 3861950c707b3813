"""Adapters that PEFT has made, in every way that it knows: once merged, the logits are PEFT's."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.store.open import load_model

torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 9))
logits = jax.jit(CausalLM.logits, static_argnums=0)  # one program for all adapters of a base
TABLES = ["embed_tokens", "lm_head"]

CASES = {
    "list": {},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r"model\.layers\.1\..*(q|v)_proj"},
    "whole names": {"target_modules": ["model.layers.0.mlp.up_proj", "self_attn.q_proj", "c_attn"]},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "excluded by expression": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
    "one layer": {"layers_to_transform": 0},
    "layers of a pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 4, "proj": 9, ".*.v_proj": 1},
        "alpha_pattern": {"up_proj": 11, r"model\.layers\.\d\.self_attn.v_proj": 0.5},
    },
    "rslora with patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"1.self_attn.q_proj": 7},
    },
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "dora of one layer": {"use_dora": True, "use_rslora": True, "layers_to_transform": [1]},
    "bias": {"bias": "all"},
    "gaussian, as if of GPT-2": {"init_lora_weights": "gaussian", "fan_in_fan_out": True},
    "norms": {"modules_to_save": ["norm"]},
    "a module of modules": {"modules_to_save": ["layers.1.mlp"], "target_modules": ["up_proj"]},
    "saved rather than adapted": {"modules_to_save": ["q_proj"], "target_modules": ["q_proj", "v_proj"]},
    # The rest once more where the base ties its tables.
    "tables saved": {"modules_to_save": TABLES},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tables adapted": {"target_modules": [*TABLES, "q_proj"]},
    "tables adapted, dora": {"target_modules": TABLES, "use_dora": True},
    "head adapted": {"target_modules": ["lm_head"]},
    "embedding adapted and tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [41, 3]},
    "tokens of each table": {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7]}},
    "tokens of both tables": {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [5, 3]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [7]}},
    "larger": {"vocabulary": 64},
    "larger, tables saved": {"vocabulary": 64, "modules_to_save": TABLES},
    "larger, embedding saved": {"vocabulary": 64, "modules_to_save": ["embed_tokens"]},
    "larger, tables adapted": {"vocabulary": 64, "target_modules": TABLES},
    "larger, tokens": {"vocabulary": 64, "trainable_token_indices": [62, 3]},
}
OF_TABLES = list(CASES)[list(CASES).index("tables saved") :]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For matrices of this size torch's threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_config, tiny_tokenizer):
    """Two models of transformers, each in a folder; the second ties its tables."""
    from transformers import LlamaConfig, LlamaForCausalLM

    actual = []
    for tied in (False, True):
        torch.manual_seed(0)
        config = tiny_config | {"tie_word_embeddings": tied, "initializer_range": 0.3, "eos_token_id": 2}
        folder = tmp_path_factory.mktemp("base")
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        actual.append(LlamaForCausalLM.from_pretrained(folder))
    return actual


def make_adapter(base, folder, vocabulary=None, **options):
    """Saves a random adapter by PEFT; returns its logits, and those without it."""
    torch.manual_seed(1)
    plain = copy.deepcopy(base)
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = plain(tokens).logits[..., :60].numpy()
        if vocabulary is not None:
            plain.resize_token_embeddings(vocabulary, mean_resizing=False)
        config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
        model = peft.get_peft_model(plain, peft.LoraConfig(**config))
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return model(tokens).logits.numpy(), before


@pytest.mark.parametrize(
    ("tied", "name"), [(False, name) for name in CASES] + [(True, name) for name in OF_TABLES], ids=str
)
def test_the_logits_are_those_of_peft(tied, name, bases, tmp_path, one_device):
    expected, before = make_adapter(bases[tied], tmp_path, **CASES[name])
    loaded = load_model(tmp_path, ComputeOptions(), one_device, MeshOptions())
    assert np.abs(expected[..., :60] - before).max() > 0.1  # or the case says nothing
    assert loaded.model.config.vocab_size == expected.shape[-1]
    np.testing.assert_allclose(logits(loaded.model, loaded.params, jnp.asarray(TOKENS)), expected, atol=1e-4)


def test_a_table_that_the_file_lacks(bases, tmp_path, one_device):
    """PEFT saves the embedding alone where only that is adapted; what the head says of the new words is lost."""
    make_adapter(bases[False], tmp_path, vocabulary=64, target_modules=["embed_tokens"])
    with pytest.raises(InputError, match=r"has 64 rows, but lm_head has 60; save both"):
        load_model(tmp_path, ComputeOptions(), one_device, MeshOptions())


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "IA3Config"])
def test_adapters_of_other_kinds(kind, bases, tmp_path, one_device):
    options = {
        "PromptTuningConfig": {"num_virtual_tokens": 2},
        "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    }[kind]
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    peft.get_peft_model(copy.deepcopy(bases[False]), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"peft_type is '(PROMPT_TUNING|IA3)'; only 'LORA' is supported"):
        load_model(tmp_path, ComputeOptions(), one_device, MeshOptions())


def test_every_key_of_peft_has_a_verdict(bases, tmp_path, one_device):
    """A key of PEFT that is not named here is refused wherever it says something: this list knows them all."""
    import dataclasses

    from qstar_jax.store.hub.peft_config import _HARMLESS, _READ

    refused = {
        *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias"),
        *("monteclora_config", "target_parameters", "use_bdlora", "use_qalora", "velora_config"),
    }
    keys = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert keys - _READ - _HARMLESS <= refused and not refused & (_READ | _HARMLESS)
