"""The tokenizer of the task: byte-pair encoding, trained on texts of the language."""

import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

VOCABULARY = 768
_PIECES = r"\n| ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]| +"  # no token spans two words, and each digit is a token
SPECIAL = ("<unk>", "<pad>", "<bos>", "<eos>")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains the tokenizer; numbers are split into digits.

    Returns:
        A fast tokenizer; <unk>, <pad>, <bos> and <eos> have the ids 0 to 3, and none is added automatically.
    """
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(_PIECES), "isolated"), Metaspace(prepend_scheme="never", split=False)]
    )
    tokenizer.decoder = MetaspaceDecoder(prepend_scheme="never", split=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=[character for character in string.printable if character.isprintable() or character == "\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
