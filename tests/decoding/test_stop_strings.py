"""The automata against a plain search in the text that has been said so far."""

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qstar_jax.decoding.stop_strings import compile_stop_strings, text_before_stop, texts_behind, token_texts
from qstar_jax.errors import InputError

# As a byte-level tokenizer writes them: a blank is Ġ, a line break Ċ, and é is Ã© (two bytes, here also apart).
TOKENS = ["a", "b", "ab", "ba", "aba", "bab", "Ġ", "Ġa", "bĠ", "Ċ", "ĊĊ", "abĊ", "Ã", "©", "Ã©", "Ã©a", "aÃ", "<s>"]


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A byte-level tokenizer whose tokens overlap in every way; `<s>` is special."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", clean_up_tokenization_spaces=False)


def said(tokenizer, tokens):
    """What tokens say behind other text, decoded at once."""
    anchor = tokenizer("a").input_ids[-1:]
    text = tokenizer.decode([*anchor, *tokens], clean_up_tokenization_spaces=False)
    return text[len(tokenizer.decode(anchor)) :]


def first_stop(tokenizer, tokens, strings):
    """Number of tokens behind which a string is there for the first time, by search; None if there is none."""
    for count in range(1, len(tokens) + 1):
        if any(string in said(tokenizer, tokens[:count]) for string in strings):
            return count
    return None


def automaton_stops(stop_strings, texts):
    """The same of several texts by the automata, and whether they say beforehand what they say afterwards."""
    state = jnp.zeros((len(texts), 1, stop_strings.count), jnp.int32)
    found = [None] * len(texts)
    for count, tokens in enumerate(np.transpose(texts), 1):
        announced = np.asarray(stop_strings.completes(state))[np.arange(len(texts)), 0, tokens]
        state = stop_strings.advance(state, jnp.asarray(tokens)[:, None])
        assert (announced == np.asarray((state == stop_strings.lengths).any(-1))[:, 0])[
            [x is None for x in found]
        ].all()
        found = [count if x is None and now else x for x, now in zip(found, announced, strict=True)]
    return found


def forgetful_stop(tokenizer, tokens, strings):
    """A wrong one: what did not continue a match is forgotten, rather than searched for the beginning of another."""
    matched = dict.fromkeys(strings, 0)
    for count in range(1, len(tokens) + 1):
        for character in said(tokenizer, tokens[:count])[len(said(tokenizer, tokens[: count - 1])) :]:
            for string in strings:
                matched[string] = matched[string] + 1 if string[matched[string]] == character else 0
                if matched[string] == len(string):
                    return count
    return None


@pytest.mark.parametrize(
    "strings",
    [
        ["aab"],
        ["aabaab"],
        ["abab", "bb"],  # they overlap each other and themselves
        ["a b", "b\n\n"],
        ["aaaa", "aaa"],  # one within the other
        ["ab\na", "\n\n\n"],
        ["bé", "éa"],
        ["<s>"],
        ["b<s>a"],
    ],
    ids=str,
)
def test_they_stop_where_a_search_in_the_text_does(strings, bytes_tokenizer):
    compiled = compile_stop_strings(strings, bytes_tokenizer, len(TOKENS) + 2)
    rng = np.random.default_rng(0)
    whole = [i for i, token in enumerate(TOKENS) if token not in ("Ã", "©", "aÃ") or "é" not in "".join(strings)]
    # Of what the strings are made of, often enough.
    likely = [i for i in whole if set(said(bytes_tokenizer, [i])) <= set("".join(strings))]
    texts = [[int(rng.choice(likely if rng.random() < 0.8 else whole)) for _ in range(14)] for _ in range(60)]
    expected = [first_stop(bytes_tokenizer, tokens, strings) for tokens in texts]
    assert automaton_stops(compiled, texts) == expected
    assert sum(x is not None for x in expected) > 5 and len(set(expected)) > 2  # early, late, and several places


def test_the_comparison_can_fail(bytes_tokenizer):
    tokens = [TOKENS.index(token) for token in ("a", "aba", "ab", "b")]  # aabaabb
    assert first_stop(bytes_tokenizer, tokens, ["abaab"]) == 3
    tokens = [TOKENS.index(token) for token in ("aba", "aba", "ab")]  # abaabaab
    assert first_stop(bytes_tokenizer, tokens, ["abaabaab"]) == 3
    tokens = [TOKENS.index(token) for token in ("a", "a", "ab")]  # aaab has aab, which begins in the middle
    compiled = compile_stop_strings(["aab"], bytes_tokenizer, len(TOKENS))
    assert automaton_stops(compiled, [tokens]) == [first_stop(bytes_tokenizer, tokens, ["aab"])] == [3]
    assert forgetful_stop(bytes_tokenizer, tokens, ["aab"]) is None


def test_several_prompts_and_paths_have_states_of_their_own(bytes_tokenizer):
    compiled = compile_stop_strings(["ab", "ba"], bytes_tokenizer, len(TOKENS))
    a, b = TOKENS.index("a"), TOKENS.index("b")
    state = compiled.advance(jnp.zeros((2, 2, 2), jnp.int32), jnp.array([[a, b], [b, TOKENS.index("Ċ")]]))
    assert state.tolist() == [[[1, 0], [0, 1]], [[0, 1], [0, 0]]]
    completes = np.asarray(compiled.completes(state))
    assert completes.shape == (2, 2, len(TOKENS))
    assert completes[..., b].tolist() == [[True, False], [False, False]]
    assert completes[..., a].tolist() == [[False, True], [True, False]]


def test_words_with_blanks_between_them(tiny_tokenizer):
    compiled = compile_stop_strings(["w5 w6", "7 w1"], tiny_tokenizer, 60)
    rng = np.random.default_rng(1)
    words = tiny_tokenizer.convert_tokens_to_ids(["w1", "w5", "w6", "w7", "w17"])
    texts = rng.choice(words, (40, 8)).tolist()
    expected = [first_stop(tiny_tokenizer, tokens, ["w5 w6", "7 w1"]) for tokens in texts]
    assert automaton_stops(compiled, texts) == expected and len(set(expected)) > 3


def test_texts_of_tokens(bytes_tokenizer):
    pieces = token_texts(bytes_tokenizer, len(TOKENS) + 2)
    assert pieces[: TOKENS.index("Ã")] == ["a", "b", "ab", "ba", "aba", "bab", " ", " a", "b ", "\n", "\n\n", "ab\n"]
    assert pieces[TOKENS.index("Ã©")] == "é" and pieces[TOKENS.index("aÃ")] == "a\ufffd"
    assert pieces[len(TOKENS) :] == ["", ""]  # the model's table is larger than its tokenizer


def test_strings_that_cannot_be_said(bytes_tokenizer):
    assert compile_stop_strings([], bytes_tokenizer, len(TOKENS)) is None
    with pytest.raises(InputError, match="stop string 'xyz': no sequence"):
        compile_stop_strings(["ab", "xyz"], bytes_tokenizer, len(TOKENS))
    with pytest.raises(InputError, match="stop string 'xab': no sequence"):  # its end can be said, its beginning not
        compile_stop_strings(["xab"], bytes_tokenizer, len(TOKENS))
    with pytest.raises(InputError, match="at least one character"):
        compile_stop_strings([""], bytes_tokenizer, len(TOKENS))


def byte_fallback_tokenizer():
    """Like Llama 2's: ▁ stands for a blank, and there is a token for some of the bytes; `<s>` is special."""
    tokens = ["<unk>", "<s>", "▁", "a", "b", "▁a", "▁b", "ab", "。", "é", "a。"]
    tokens += [f"<0x{byte:02X}>" for byte in b"a\n\xe3\x80\x82\xc3\xa9\xff\xed\xa0"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(list(steps))
    return tokenizer, {"unk_token": "<unk>", "eos_token": "<s>"}


def byte_level_tokenizer():
    """A token for some of the bytes, and tokens that begin or end within a character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelled = ["a", "b", "\n", " a", "é", "。", "a。"]
    spelled = [text.encode() for text in spelled] + [bytes([byte]) for byte in b"\xe3\x80\x82\xc3\xa9\xf0\x9f\x98\xff"]
    spelled += [b"\xe3\x80", b"\x82a", b"\x82\xe3", b"\x82\n\xe3\x80", b"a\xf0\x9f", b"\x98\x82"]
    written = bytes_to_unicode()
    tokens = ["".join(written[byte] for byte in text) for text in spelled] + ["<s>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, {"eos_token": "<s>"}


def word_piece_tokenizer():
    """Like BERT's: a piece inside a word begins with ##, and words are joined by blanks."""
    tokens = ["[UNK]", "[EOS]", "a", "b", "##a", "##b", "。", "##。", "é", "##é", "ab"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer, {"unk_token": "[UNK]", "eos_token": "[EOS]"}


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer, word_piece_tokenizer])
def test_characters_of_several_tokens(make):
    """Where each list of strings ends an answer, and what is left of its text, by search in what is decoded."""
    from transformers import PreTrainedTokenizerFast

    inner, names = make()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    rng = np.random.default_rng(0)
    several = rng.integers(0, len(tokenizer), (300, 8)).tolist()
    begun = texts_behind(tokenizer, [tokens[:count] for tokens in several for count in range(1, 9)])
    stopped = 0
    for strings in (["。"], ["a。"], ["é", "b。"], ["。a"], ["a\n", "\né"], ["aa", "éa"], ["。。"]):
        if make is word_piece_tokenizer and "\n" in strings[0]:
            continue
        compiled = compile_stop_strings(strings, tokenizer, len(tokenizer) + 2)
        table, complete = np.asarray(compiled.table), np.asarray(compiled.lengths)
        for row, tokens in enumerate(several):
            said = begun[8 * row : 8 * row + 8]
            expected = next((n for n, text in enumerate(said) if any(string in text for string in strings)), None)
            states, found = np.zeros(len(strings), int), None
            for count, token in enumerate(tokens):
                states = table[np.arange(len(strings)), states, token]
                if found is None and (states == complete).any():
                    found = count
            assert found == expected, (strings, tokenizer.convert_ids_to_tokens(tokens))
            if found is not None and not set(tokens[: found + 1]) & set(tokenizer.all_special_ids):
                stopped += 1
                left = said[found][: min(at for at in map(said[found].find, strings) if at >= 0)]
                text = text_before_stop(strings, tokens[: found + 1], tokenizer)
                if not tokenizer.decode(tokens[:1]).startswith("##"):  # a first piece that continues nothing
                    assert text == left or " " + text == left  # decoders drop the blank before the first word
    assert stopped > 200


def test_a_text_ends_before_a_stop_string_with_special_tokens_in_it(bytes_tokenizer):
    def text(strings, *tokens):
        return text_before_stop(strings, [TOKENS.index(token) for token in tokens], bytes_tokenizer)

    assert text(["<s>"], "a", "b", "<s>") == "ab"
    assert text(["b<s>a"], "a", "<s>", "ab", "<s>", "ab") == "aa"
    assert text(["é"], "<s>", "aÃ", "©") == "a"
    assert text(["é", "bé"], "ab", "Ã", "©") == "a"


def test_strings_that_are_no_text(bytes_tokenizer):
    with pytest.raises(InputError, match="half of a surrogate pair"):
        compile_stop_strings(["a\ud800"], bytes_tokenizer, len(TOKENS))
