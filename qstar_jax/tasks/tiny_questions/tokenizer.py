"""The tokenizer of the task: a token per word, and a chat template."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from qstar_jax.tasks.tiny_questions.game import ATTRIBUTES, THINGS

SPECIAL = ("<unk>", "<pad>", "<end>", "<eos>", "<user>", "<assistant>")
_WORDS = ("what", "is", "it", "?", "!", "yes", "no", *ATTRIBUTES, *THINGS)
TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else ' ' }}<{{ message['role'] }}> {{ message['content'] }} <end>"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


def make_tokenizer(eos: str = "<end>") -> PreTrainedTokenizerFast:
    """Makes the tokenizer.

    Args:
        eos: Its EOS: `<end>`, which ends every turn, for messages; `<eos>` for dialogues as text.
    """
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate((*SPECIAL, *_WORDS))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token=eos,
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast
