"""Where prompts end, with every kind of tokenizer: the ids must be those of the whole dialogue."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qstar_jax.config import DataOptions
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import tokenize

TEXTS = [
    "The cat sat on the mat and looked at the red door.",
    "A small dog ran over the green hill in the rain.",
    "Please write a short answer about rivers, boats and bridges.",
    "Water is wet; stones are hard; bread is good.",
    "What is the name of the town? The town has no name.",
    "[INST] What is wet? [/INST] Water is wet. ",
    "User: What is wet?\nAssistant: Water is wet.\n\nUser: Name the town.\n",
    "system user assistant You are a helpful clerk.",
] * 4
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TRAINED = {"special_tokens": SPECIALS, "show_progress": False}


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, **TRAINED)


def llama2():
    """Spaces are letters, and each text gets one in front; there are no words, so any neighbours may merge."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training only, see `tokenizer`
    return tokenizer, trainers.BpeTrainer(vocab_size=300, **TRAINED)


def metaspace(scheme):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer, trainers.BpeTrainer(vocab_size=300, **TRAINED)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **TRAINED)


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=200, **TRAINED)


KINDS = {
    "byte-level BPE": byte_level_bpe,
    "Llama 2": llama2,
    "Metaspace, a space prepended": lambda: metaspace("always"),
    "Metaspace, prepended to the first": lambda: metaspace("first"),
    "Metaspace, nothing prepended": lambda: metaspace("never"),
    "Unigram": unigram,
    "WordPiece": word_piece,
}
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "Llama 2, with BOS": "{{ bos_token }}" + INST,
    "Llama 2, without BOS": INST,
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
    ),
    # The prompt ends with a space, which tokens share with the word that follows.
    "words": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '\n') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    """Puts BOS before plain text, as most tokenizers do."""
    backend, trainer = KINDS[request.param]()
    backend.train_from_iterator(TEXTS, trainer)
    if request.param == "Llama 2":
        backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def example_of(tokenizer, prompt, *responses, **more):
    [example], [] = tokenize([Record(prompt, responses, 0)], tokenizer, DataOptions(), **more)
    return example


def message(role, text):
    return [{"role": role, "content": text}]


PROMPTS = {
    "one turn": message("user", "What is wet?"),
    "several turns": message("user", "Name the town.")
    + message("assistant", "The town has no name.")
    + message("user", "What is wet?"),
}
# Beginnings that could merge with the prompt: a line break, the same words, an unknown letter.
PAIRS = [
    ("Water is wet.", "Bread."),
    ("\nWater is wet.", "stones"),
    ("Water is good.", "Water is wet."),
    ("é.", "stones"),
]


def test_a_token_that_would_span_the_boundary_is_split(character_tokenizer):
    tokenizer = character_tokenizer(merges=["bc"])
    assert tokenizer.tokenize("abcd") == ["a", "bc", "d"]
    [example], [] = tokenize([Record("ab", ("cd",), 0)], tokenizer, DataOptions())
    assert tokenizer.convert_ids_to_tokens(example.prompt.tolist()) == ["a", "b"]
    assert tokenizer.convert_ids_to_tokens(example.responses[0].ids.tolist()) == ["c", "d", "[E]"]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_have_the_ids_of_the_whole_dialogue(tokenizer, template, prompt):
    eos_ids = {tokenizer.convert_tokens_to_ids("<|im_end|>" if template == "ChatML" else "</s>")}
    tokenizer.chat_template = TEMPLATES[template]
    alone = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert example_of(tokenizer, prompt, eos_ids=eos_ids).prompt.tolist() == alone
    for pair in PAIRS:
        example = example_of(tokenizer, prompt, *(message("assistant", text) for text in pair), eos_ids=eos_ids)
        for text, response in zip(pair, example.responses, strict=True):
            whole = tokenizer.apply_chat_template(prompt + message("assistant", text), return_dict=False)
            ended = len(whole) - next(i for i, token in enumerate(reversed(whole)) if token in eos_ids)
            ids = [*example.prompt.tolist(), *response.ids.tolist()]
            assert ids == whole[:ended]
            assert not tokenizer.decode(whole[ended:]).strip()  # a line break after <|im_end|>
            assert ids.count(tokenizer.bos_token_id) == (template == "Llama 2, with BOS")
            assert not response.truncated and response.ids[-1] in eos_ids
        if template != "words":  # no token spans the boundary, so generation starts from the same prompt
            assert example.prompt.tolist() == alone


def test_tokens_across_the_boundary_of_a_chat_belong_to_the_responses(character_tokenizer, chat_tokenizer):
    template = chat_tokenizer.chat_template.replace("<assistant>", "<assistant>x")
    template = template.replace("<{{ m.role }}>", "<{{ m.role }}>{{ 'x' if m.role == 'assistant' }}")
    tokenizer = character_tokenizer(chat_template=template, merges=["xa", "xbc"])
    responses = [message("assistant", text) for text in ("a", "bc", "d")]
    for pair, texts in (((0, 1), ["xa[E]", "xbc[E]"]), ((0, 2), ["xa[E]", "xd[E]"]), ((2, 2), None)):
        records = [Record(message("user", "q"), tuple(responses[i] for i in pair), 0)]
        examples, dropped = tokenize(records, tokenizer, DataOptions())
        if texts is None:
            assert examples == [] and "are equal" in dropped[0].reason
            continue
        assert tokenizer.decode(examples[0].prompt).endswith("<assistant>")
        assert [tokenizer.decode(r.ids) for r in examples[0].responses] == texts
    assert tokenizer.decode(example_of(tokenizer, message("user", "q"), responses[2]).prompt).endswith("<assistant>x")


@pytest.mark.parametrize("response", [" Water is wet.", "\nWater is wet.", "; stones are hard.", "\n\nThe town"])
def test_text_has_the_ids_that_it_has_after_its_prompt(tokenizer, response):
    prompt = "What is wet"
    alone, whole = tokenizer(prompt).input_ids, tokenizer(prompt + response).input_ids
    example = example_of(tokenizer, prompt, response)
    assert example.prompt.tolist() == alone
    if whole[: len(alone)] == alone:
        assert example.responses[0].ids.tolist() == [*whole[len(alone) :], tokenizer.eos_token_id]
    else:
        assert len(whole) < len(alone) + len(example.responses[0].ids) - 1  # a token would have spanned the boundary


@pytest.mark.parametrize(
    ("prompt", "response"), [("What is wet? ", "Water is wet."), ("What is the na", "me of the town?")]
)
def test_text_whose_token_would_span_the_boundary(tokenizer, prompt, response):
    example = example_of(tokenizer, prompt, response)
    assert example.prompt.tolist() == tokenizer(prompt).input_ids
    pieces = tokenizer.convert_ids_to_tokens(example.responses[0].ids.tolist())
    assert not pieces[0].startswith("▁")  # the prompt has the space already, or there is none
    text = tokenizer.decode([*example.prompt, *example.responses[0].ids], skip_special_tokens=True)
    if tokenizer.backend_tokenizer.model.__class__.__name__ != "WordPiece":  # has no tokens for spaces
        assert text == prompt + response


def test_an_unknown_word_is_not_merged_with_the_one_before(tokenizer):
    # Some tokenizers make one <unk> of both, which has the id of the prompt's last token but ends after it.
    example = example_of(tokenizer, "A é", "é.")
    assert len(example.responses[0].ids) >= 3 or "é" in tokenizer.decode(example.responses[0].ids)


def test_a_prompt_that_begins_with_bos_gets_no_second_one(tokenizer):
    twice = tokenizer("<s>What is wet?").input_ids
    example = example_of(tokenizer, "<s>What is wet?", " Water.")
    assert twice[:2] == [1, 1] and example.prompt.tolist() == twice[1:]
    assert example.responses[0].ids.tolist()[:-1] == tokenizer("<s>What is wet? Water.").input_ids[len(twice) :]


def test_turns_end_with_any_eos_of_the_model(tokenizer):
    # As in Llama 3: the tokenizer's EOS ends a text, and generation_config.json adds the token that ends a turn.
    tokenizer.chat_template = TEMPLATES["ChatML"]
    prompt, response = message("user", "What is wet?"), message("assistant", "Water.")
    whole = tokenizer.apply_chat_template(prompt + response, return_dict=False)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ended = len(whole) - whole[::-1].index(turn)
    for eos_ids, expected in (((turn,), whole[:ended]), ((), [*whole, tokenizer.eos_token_id])):
        example = example_of(tokenizer, prompt, response, eos_ids=eos_ids)
        np.testing.assert_array_equal([*example.prompt, *example.responses[0].ids], expected)
