"""Tiny tokenizers with one token per character, so that lengths can be counted by eye."""

import importlib.util
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "\x1b"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'banned' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build(*, bos=None, eos="[E]", pad="[P]", chat_template=None, merges=(), before="", after=""):
    """Builds a tokenizer with a token per character and per string of `merges`.

    With special tokens, texts begin with `before` and end with `after`.
    """
    specials = list(dict.fromkeys(name for name in (bos, eos, pad) if name))
    vocabulary = {name: index for index, name in enumerate([*specials, "[U]", *CHARACTERS, *merges])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    pieces = "|".join([*merges, r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    if before or after:
        single = " ".join(filter(None, [before, "$A", after]))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(name, vocabulary[name]) for name in (before, after) if name]
        )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token="[U]",
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def character_tokenizer():
    """Builds a tokenizer from keywords, see `build`."""
    return build


@pytest.fixture(scope="session")
def plain_tokenizer():
    """Has no BOS, and pads with EOS, as many published tokenizers do."""
    return build(pad="[E]")


@pytest.fixture(scope="session")
def chat_tokenizer():
    """Puts BOS before plain text (by the tokenizer) and before chats (by the template)."""
    return build(bos="[B]", chat_template=CHAT_TEMPLATE, before="[B]")


@pytest.fixture(scope="session")
def slow_batch():
    """The function `slow_batch` of the module of that name."""
    path = Path(__file__).parent / "slow_batches.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.slow_batch
