"""Parity with torch transformers (the oracle), and what must hold without any oracle."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.reward_model import load_reward
from qstar_jax.sharding import make_mesh
from qstar_jax.store import hub

TEMPLATE = "{% for m in messages %}[BOS] {{ m['role'] }} {{ m['content'] }} [EOS] w0 {% endfor %}"
# Many lengths, beyond and below the width of one program; an empty prompt and an empty response.
PAIRS = [(f"w{i} w2", "w5 " * n) for i, n in enumerate([1, 3, 9, 30, 61, 62, 63, 100])] + [("", "w1"), ("w4", "")]


def write_classifier(folder, tiny_config, hf_folder, tokenizer, **changes):
    """The tiny model with a head instead of its unembedding."""
    folder.mkdir()
    tensors = load_file(hf_folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    tensors["score.weight"] = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    config |= {"pad_token_id": 0, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory, tiny_config, hf_folder, tiny_tokenizer):
    def make(chat=False, **changes):
        folder = tmp_path_factory.mktemp("classifier") / "model"
        write_classifier(folder, tiny_config, hf_folder, tiny_tokenizer, **changes)
        if chat:
            (folder / "chat_template.jinja").write_text(TEMPLATE)
        return folder

    return make


def oracle(torch, folder, rows: list[list[int]], pad: int):
    """Logits of torch, all rows in one right-padded batch."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).logits[:, 0].numpy()


@pytest.mark.parity
@pytest.mark.parametrize("pad", [0, 2], ids=["pad", "pad = EOS"])
@pytest.mark.parametrize("as_chat", [False, True], ids=["text", "chat"])
def test_scores_are_those_of_transformers(as_chat, pad, make, one_device):
    torch = pytest.importorskip("torch")
    folder = make(chat=as_chat, pad_token_id=pad)
    reward = load_reward(str(folder), mesh=one_device, data=DataOptions(as_chat=as_chat))
    found = reward(PAIRS)
    tokenizer = hub.read_tokenizer(folder)
    if as_chat:
        chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in PAIRS]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    else:
        rows = [
            tokenizer(p).input_ids + tokenizer(a, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            for p, a in PAIRS
        ]
    expected = oracle(torch, folder, rows, pad)
    assert np.ptp(expected) > 0.5  # the answers are told apart
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_each_score_is_of_its_own_text(make, one_device):
    reward = load_reward(str(make()), mesh=one_device, batch_size=3)
    together = reward(PAIRS)
    alone = [reward([pair])[0] for pair in PAIRS[:4]]
    np.testing.assert_allclose(alone, together[:4], atol=1e-5)


def test_on_a_mesh(make):
    mesh = make_mesh(MeshOptions(data=2, fsdp=2, tensor=2))
    folder = str(make())
    found = load_reward(folder, mesh=mesh, mesh_options=MeshOptions(min_shard_size=64))(PAIRS)
    one = load_reward(folder, mesh=make_mesh(MeshOptions(data=1), devices=mesh.devices.flat[:1]))(PAIRS)
    np.testing.assert_allclose(found, one, atol=1e-5)
    with pytest.raises(InputError, match=r"judge\.batch_size 3 cannot be sharded evenly over 4 devices"):
        load_reward(folder, mesh=mesh, batch_size=3)


def test_bfloat16(make, one_device):
    folder = str(make())
    compute = ComputeOptions(param_dtype="bfloat16", dtype="bfloat16")
    found = load_reward(folder, mesh=one_device, compute=compute)(PAIRS)
    np.testing.assert_allclose(found, load_reward(folder, mesh=one_device)(PAIRS), atol=0.3)


def test_what_is_cut_or_unreadable_is_said(make, one_device, recorder):
    reward = load_reward(
        str(make()), mesh=one_device, data=DataOptions(max_length=20, max_prompt_length=8), console=recorder
    )
    found = reward([("w1", "w2 " * 30), ("w1", "w2 [EOS] w3"), ("w1", "w2")])
    assert math.isnan(found[1]) and not math.isnan(found[0] + found[2])
    assert recorder.lines == [
        "no reward for 1 responses: EOS token inside a response",
        "1 of 2 responses were truncated: they exceed judge.max_length",
    ]


def test_long_chats_lose_their_beginning(make, one_device, recorder):
    folder = str(make(chat=True))
    data = DataOptions(as_chat=True, max_length=12)
    found = load_reward(folder, mesh=one_device, data=data, console=recorder)([("w1 " * 30, "w2 w3"), ("w9", "w2 w3")])
    assert recorder.lines == ["1 of 2 chats lost their beginning: they exceed judge.max_length"]
    assert not np.isnan(found).any()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "classifier with 3 labels is no reward model"),
        ({"id2label": None}, "classifier with 2 labels"),
        ({"model_type": "bert"}, "unknown architecture"),
        ({"hidden_size": 64}, r"has shape \(60, 32\)"),
    ],
)
def test_folders_that_cannot_be_used(changes, match, make, one_device):
    with pytest.raises(InputError, match=match):
        load_reward(str(make(**changes)), mesh=one_device)


def test_a_folder_without_a_head(make, one_device, hf_folder):
    folder = make()
    shutil.copy(hf_folder / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no tensor 'score\.weight'"):
        load_reward(str(folder), mesh=one_device)


def test_options_that_a_classifier_does_not_read(make, one_device):
    with pytest.raises(InputError, match=r"judge\.beta has no effect on a classifier"):
        load_reward(str(make()), mesh=one_device, beta=0.1)
    with pytest.raises(InputError, match="no chat template"):
        load_reward(str(make()), mesh=one_device, data=DataOptions(as_chat=True))([("w1", "w2")])


def test_a_pad_id_beyond_the_embedding_changes_nothing(make, one_device):
    found, expected = (load_reward(str(make(pad_token_id=pad)), mesh=one_device)(PAIRS[:2]) for pad in (4000, 0))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_word_beyond_the_embedding(as_chat, tmp_path, tiny_config, hf_folder, tiny_tokenizer, one_device):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["Zebra"])
    folder = write_classifier(tmp_path / "model", tiny_config, hf_folder, tokenizer)
    reward = load_reward(str(folder), mesh=one_device, data=DataOptions(as_chat=as_chat))
    with pytest.raises(
        InputError, match=r"judge\.model, text of row 2: the token 'Zebra' has id 60, but the model has only 60"
    ):
        reward([("w1", "w2"), ("w1", "w2 Zebra")])
