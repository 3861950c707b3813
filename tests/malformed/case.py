"""One malformed input: how it is made, the command that reads it, and what must come of that."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

WORDS = [f"w{i}" for i in range(56)]
SPECIALS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
PAIR = {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}
LIMIT_SECONDS, LIMIT_BYTES = 60, 2 * 2**30
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)  # what acts in a terminal; not \t and \n

Tensors = dict[str, np.ndarray]


class Place:
    """An empty folder in which a case writes, with good inputs to spoil."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.out = str(folder / "out")

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def model(self, config: dict[str, Any] | None = None, tensors: Tensors | None = None) -> Path:
        """Writes a good model, or one with another config.json or other weights."""
        folder = self / "model"
        shutil.copytree(_good_model(), folder)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if tensors is not None:
            write_tensors(folder / "model.safetensors", tensors)
        return folder

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> Path:
        """Writes rows as JSON lines; text and bytes are written as they are."""
        encoded = [
            row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        path = self / name
        path.write_bytes(b"".join(line + b"\n" for line in encoded))
        return path

    def export(self, model: Path | str) -> list[str]:
        """The command that reads all of a model's folder without compiling anything."""
        return ["export", "--model", str(model), "--out", self.out]


def weights(config: dict[str, Any] = CONFIG) -> Tensors:
    """Random weights of a Llama."""
    rng = np.random.default_rng(0)
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    key_width = width // heads * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (key_width, width),
        "self_attn.v_proj": (key_width, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes = {"model.embed_tokens": (config["vocab_size"], width), "model.norm": (width,)}
    shapes |= {
        f"model.layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()
    }
    shapes["lm_head"] = (config["vocab_size"], width)
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_tensors(path: Path, tensors: Tensors):
    """Writes a safetensors file by hand: the library refuses some of what a file may hold."""
    kinds = {"f4": "F32", "f2": "F16", "f8": "F64", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64", "u1": "U8"}
    kinds |= {"b1": "BOOL", "c8": "C64"}
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        kind, shape = kinds[tensor.dtype.str[1:]], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    write_safetensors(path, json.dumps(header).encode(), b"".join(tensor.tobytes() for tensor in tensors.values()))


def write_safetensors(path: Path, header: bytes, data: bytes = b""):
    """Writes a safetensors file with any header."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@cache
def _good_model() -> Path:
    import atexit
    import tempfile

    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = Path(tempfile.mkdtemp(prefix="malformed-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tensors(folder / "model.safetensors", weights())
    vocabulary = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Case:
    """A malformed input.

    Attributes:
        name: Its kind and what is wrong with it, as "config: hidden_size is text".
        write: Writes it in an empty place, with random choices; returns the words of the command that reads it.
        says: Regular expression that the message must match.
        heavy: Needs limits on time or memory that only a process of its own has.
    """

    name: str
    write: Callable[[Place, Random], list[str]]
    says: str
    heavy: bool = False


def problem(code: int | None, message: str, says: str) -> str | None:
    """Says what is wrong with the answer to a malformed input; None if it is right.

    Args:
        code: The exit code of the command; None if it ended in an exception.
        message: What it wrote to its standard error.
        says: What it must have said.
    """
    if code is None:
        return f"a traceback: {(message.strip().splitlines() or ['killed'])[-1][:300]}"
    if code == 0:
        return "accepted"
    sentence = message.strip().splitlines()[-1] if message.strip() else ""
    if code != 2:
        return f"exit code {code}: {sentence[:300]}"
    if acting := _ACTING.search(message):
        return f"prints {acting[0]!r} as it is"
    if len(message) > 4000:
        return f"a message of {len(message):,} characters: {message[:200]}"
    if not re.search(says, message):
        return f"says {sentence[:400]!r}, not {says!r}"
    return None
