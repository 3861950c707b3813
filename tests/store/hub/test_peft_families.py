"""PEFT and every family: adapters of ours and of PEFT's, fused layers among them, have the same logits in both."""

import copy
import json
import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.losses import make_loss
from qstar_jax.models import CausalLM
from qstar_jax.models.lora import attach_adapter
from qstar_jax.store import hub
from qstar_jax.store.hub.peft_file import TENSORS
from qstar_jax.store.open import load_model
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.step import TrainState, make_train_step

torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 12))
BETA, LEARNING_RATE, MOMENTUM = 0.5, 0.05, 0.9
logits_of = jax.jit(CausalLM.logits, static_argnums=0)  # one program for all adapters of a base


@pytest.fixture(scope="module")
def base_of(family_folder, one_device):
    """`base_of(name)`: a tiny model as transformers opens it, its folder, and as it is opened here."""
    from transformers import AutoModelForCausalLM

    @cache
    def make(name):
        folder = family_folder(name)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
        return theirs, folder, load_model(folder, ComputeOptions(), one_device, MeshOptions())

    return make


def logits_of_torch(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def opened_by_peft(theirs, folder, **options):
    """PEFT's model of an adapter's folder; nothing of it may be missing, unknown or of another kind than expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder, **options)


def random_adapter(model):
    fresh = jax.jit(model.init_adapter)(jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


def make_adapter(theirs, folder, **options):
    """Saves a random adapter by PEFT; returns its logits."""
    torch.manual_seed(1)
    config = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"} | options
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return logits_of_torch(model)


def torch_loss(model, examples):
    """DPO's loss of (chosen, rejected) pairs, each response by itself behind its prompt."""

    def logp(example):
        for response in example.responses:
            row = torch.from_numpy(np.concatenate([example.prompt, response.ids]).astype(np.int64))
            scores = model(row[None]).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
            yield scores.gather(-1, row[len(example.prompt) :, None]).sum()

    losses = []
    for example in examples:
        with torch.no_grad(), model.disable_adapter():
            reference = list(logp(example))
        chosen, rejected = (own - other for own, other in zip(logp(example), reference, strict=True))
        losses.append(-torch.nn.functional.logsigmoid(BETA * (chosen - rejected)))
    return torch.stack(losses).mean()


def two_steps_of_torch(model, examples):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, LEARNING_RATE, MOMENTUM)
    for _ in range(2):
        optimizer.zero_grad()
        torch_loss(model, examples).backward()
        optimizer.step()


def two_steps(model, base, adapter, batch):
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)
    step = jax.jit(make_train_step(preference_loss_fn(model, make_loss(beta=BETA)), optimizer))
    state = TrainState(jnp.int32(0), adapter, optimizer.init(adapter), None, base)
    for _ in range(2):
        state, _ = step(state, batch)
    return state.params


@pytest.mark.slow
@pytest.mark.thin("gemma2", "gpt_neox", "gpt2")
@pytest.mark.parametrize(
    "family",
    [
        *("llama_biases", "llama3_tied", "mistral", "qwen2", "qwen2_window", "qwen3", "gemma", "gemma2", "gemma3"),
        *("gemma3_images", "phi3", "olmo2", "smollm3", "gpt_neox", "gpt_neox_sequential", "gpt2", "gpt2_hub"),
    ],
)
def test_two_steps_of_training(family, base_of, pair_batch, random_examples, tmp_path, one_device, assert_norm_close):
    """Adapters open in PEFT; trained there or here, they have the same logits in both, before and after."""
    theirs, base_folder, base = base_of(family)
    model = base.model.with_lora(3, 4.0)
    adapter = random_adapter(model)
    hub.write_adapter(tmp_path / "before", model, adapter, str(base_folder))
    in_torch = opened_by_peft(theirs, tmp_path / "before", is_trainable=True).eval()
    before = logits_of_torch(in_torch)
    assert np.abs(before - logits_of_torch(theirs)).max() > 0.1
    assert_norm_close(logits_of(model, attach_adapter(base.params, adapter), TOKENS), before, 1e-4)

    two_steps_of_torch(in_torch, random_examples(3))
    trained = two_steps(model, base.params, adapter, pair_batch(3))
    after, after_here = logits_of_torch(in_torch), logits_of(model, attach_adapter(base.params, trained), TOKENS)
    assert np.abs(after - before).max() > 0.01
    if len(set(model.linear_modules.values())) == len(model.linear_modules):
        assert_norm_close(after_here, after, 1e-4)
    # PEFT trains one pair of matrices of a fused layer, and here each part has one: they go other ways from here on.
    hub.write_adapter(tmp_path / "here", model, trained, str(base_folder))
    assert_norm_close(after_here, logits_of_torch(opened_by_peft(theirs, tmp_path / "here")), 1e-4)
    in_torch.save_pretrained(tmp_path / "there")
    merged = load_model(tmp_path / "there", ComputeOptions(), one_device, MeshOptions())
    assert_norm_close(logits_of(merged.model, merged.params, TOKENS), after, 1e-4)


FUSED = {"phi3": "qkv_proj", "gpt_neox": "query_key_value", "gpt2": "c_attn"}
CASES = {
    "phi3": {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True, "use_rslora": True},
    "phi3 saved": {"target_modules": ["o_proj"], "modules_to_save": ["qkv_proj", "mlp"]},
    "gpt_neox": {"target_modules": "all-linear", "bias": "lora_only", "rank_pattern": {"query_key_value": 3}},
    "gpt_neox saved": {"target_modules": ["lm_head"], "modules_to_save": ["query_key_value", "final_layer_norm"]},
    "gpt_neox_sequential": {"target_modules": ["dense"], "bias": "all", "use_dora": True},
    "gpt2": {"target_modules": "all-linear", "use_dora": True},
    "gpt2 biases": {"bias": "all", "target_modules": ["c_attn"], "modules_to_save": ["ln_1", "lm_head"]},
    "gpt2 tables": {"target_modules": ["wte", "wpe", "attn.c_proj"], "bias": "lora_only"},
    "gpt2 saved": {"target_modules": ["c_proj"], "modules_to_save": ["c_attn", "ln_f", "wpe"]},
    "gpt2 words": {"trainable_token_indices": [5, 3], "target_modules": ["c_fc"]},
    "qwen2_window": {"target_modules": ["q_proj", "o_proj"], "bias": "all"},
    "qwen2": {"target_modules": ["k_proj", "embed_tokens"], "bias": "lora_only"},
    "llama_biases": {"target_modules": "all-linear", "bias": "all", "use_dora": True},
    "gemma3": {"target_modules": ["q_proj"], "modules_to_save": ["q_norm", "post_feedforward_layernorm", "norm"]},
    "gemma3_images": {"target_modules": "all-linear", "exclude_modules": r"model\.language_model\.layers\.0\..*"},
    "gemma3_images saved": {"target_modules": r".*language_model.*\.(v_proj|down_proj)", "modules_to_save": ["k_norm"]},
    "olmo2": {"target_modules": ["o_proj"], "modules_to_save": ["k_norm", "post_attention_layernorm"]},
}


@pytest.mark.thin("gpt_neox", "gpt2", "gpt2 biases", "gpt2 saved", "gpt2 tables", "phi3", "phi3 saved", "gemma3_images")
@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft(case, base_of, tmp_path, one_device, assert_norm_close):
    theirs, _, base = base_of(case.split()[0])
    expected = make_adapter(theirs, tmp_path, **CASES[case])
    assert np.abs(expected - logits_of_torch(theirs)).max() > 0.1
    loaded = load_model(tmp_path, ComputeOptions(), one_device, MeshOptions())
    assert (loaded.model == base.model) == (case not in ("gpt2 biases", "gpt2 tables", "qwen2"))  # whose tables part
    assert_norm_close(logits_of(loaded.model, loaded.params, TOKENS), expected, 1e-4)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_some_parts_of_fused_layers(family, stabilised, base_of, tmp_path, assert_norm_close):
    """One pair of matrices has the ranks of those parts that are adapted, and leaves the others alone."""
    theirs, folder, base = base_of(family)
    model = base.model.with_lora(2, 5.0, ["v_proj", "q_proj", "down_proj"], stabilised)
    adapter = random_adapter(model)
    hub.write_adapter(tmp_path, model, adapter, str(folder))
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / TENSORS)
    ranks = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]: len(value) for name, value in tensors.items() if "lora_A" in name
    }
    assert ranks[FUSED[family]] == 4 and sorted(ranks.values()) == [2, 4]
    assert list(config["rank_pattern"].values()) == [4] and config["fan_in_fan_out"] == (family == "gpt2")
    expected = logits_of_torch(opened_by_peft(theirs, tmp_path))
    assert_norm_close(logits_of(model, attach_adapter(base.params, adapter), TOKENS), expected, 1e-4)


def test_names_of_multimodal_bases(base_of, tmp_path, one_device, assert_norm_close):
    """PEFT finds the decoder in the middle of the model, and layers of the same names that look at images."""
    theirs, folder, base = base_of("gemma3_images")
    model = base.model.with_lora(2, 4.0, ["q_proj"])
    hub.write_adapter(tmp_path / "new", model, random_adapter(model), str(folder))
    tensors = load_file(tmp_path / "new" / TENSORS)
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in tensors)
    expected = logits_of_torch(opened_by_peft(theirs, tmp_path / "new"))
    # As transformers called them before 4.52.
    before, instead = "model.model.language_model.layers", "model.language_model.model.layers"
    (tmp_path / "old").mkdir()
    save_file({name.replace(before, instead): x for name, x in tensors.items()}, tmp_path / "old" / TENSORS)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    config["target_modules"] = r"language_model\.model\.layers\..*q_proj"
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    for name in ("new", "old"):
        loaded = load_model(tmp_path / name, ComputeOptions(), one_device, MeshOptions())
        assert_norm_close(logits_of(loaded.model, loaded.params, TOKENS), expected, 1e-4)
    with pytest.raises(
        InputError, match=r"tensor names of an adapter depend on the config\.json of its base, \./gone/away: "
    ):
        hub.write_adapter(tmp_path / "lost", model, random_adapter(model), "./gone/away")
    assert not (tmp_path / "lost").exists()


def test_biases_that_are_missing_or_not_spoken_of(base_of, tmp_path, one_device):
    theirs, _, _ = base_of("gpt2")
    make_adapter(theirs, tmp_path, target_modules=["c_attn"], bias="lora_only")
    weights, settings = tmp_path / TENSORS, tmp_path / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"bias": "none"}))
    with pytest.raises(InputError, match=r"holds 3 tensors .*c_attn\.base_layer\.bias; its bias is 'none'"):
        load_model(tmp_path, ComputeOptions(), one_device, MeshOptions())
    settings.write_text(json.dumps(config))
    save_file({name: value for name, value in tensors.items() if "bias" not in name}, weights)
    with pytest.raises(InputError, match=r'no transformer\.h\.0\.attn\.c_attn\.bias, which bias .*"bias": "none"'):
        load_model(tmp_path, ComputeOptions(), one_device, MeshOptions())
    save_file(tensors | {"base_model.model.h.0.attn.c_attn.base_layer.bias": np.zeros(96, np.float32)}, weights)
    with pytest.raises(InputError, match=r"h\.0\.attn.* and .*h\.0\.attn.* are the same tensor; remove one of them"):
        load_model(tmp_path, ComputeOptions(), one_device, MeshOptions())
