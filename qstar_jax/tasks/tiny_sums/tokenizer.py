"""The tokenizer of the task: a token per digit or sign, with the space before it."""

from string import digits

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<pad>", "<eos>")
_PIECES = (*digits, *(f" {sign}" for sign in (*digits, *"+=;#")))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes the tokenizer; <unk>, <pad> and <eos> have the ids 0 to 2, and none is added automatically."""
    tokenizer = Tokenizer(WordLevel({piece: n for n, piece in enumerate((*SPECIAL, *_PIECES))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r" ?."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
