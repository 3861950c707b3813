"""The record of a response, and the text of its tokens."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qstar_jax.errors import InputError
from qstar_jax.evaluation.pieces import lone_piece, token_pieces
from qstar_jax.evaluation.scored import (
    Alternative,
    ScoredResponse,
    by_row,
    pair_margin,
    read_scores,
    unscored_line,
)
from qstar_jax.mdp import step_rewards


def test_lines_are_read_back_whatever_their_texts_hold(respond, tmp_path):
    first = respond(["a\u2028b", "\x85"], [0.1, 0.2])  # ends of lines to `str.splitlines`, and none in JSON
    lines = [first.to_json(), unscored_line(1, "no\u2029 prompt"), respond(["c"], [0.3], row=2).to_json()]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    responses = read_scores(path)
    assert responses[0] == first and [response.row for response in responses] == [0, 2]
    assert lines[0].keys() == lines[1].keys() and lines[1]["reason"] == "no\u2029 prompt"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "Expecting property name"),
        (b"[]", r"found \[\]; expected an object"),
        (b"\xff", "codec can't decode"),
        ({"q": ["high", 0.0]}, r"q is \['high', 0.0\]; expected a list, each entry a number"),
        ({"q": [True, 0.0]}, "q is .*each entry a number"),
        ({"pieces": "ab"}, "pieces is 'ab'; expected a list, each entry a text"),
        ({"beta": None}, "beta is None; expected a number"),
        ({"truncated": "no"}, "truncated is 'no'; expected true or false"),
        ({"action_mask": [1, 1]}, "action_mask is .*true or false"),
        ({"endogenous": ["x", None]}, "endogenous is .*each entry a number or null"),
        ({"total_reward": 9.0}, r"total_reward is 9\.0, and the rewards of the tokens add up to 0\.3"),
        ({"total_reward": None}, "total_reward is None; expected a number"),
        ({"step": [0, 1], "steps": [{"reward": 0.1}]}, r"rewards \[0\.1\], .* add up to \[0\.1, 0\.2\]"),
        ({"step": [0, 1], "steps": [{"reward": 0.1}, {}]}, "no reward"),
        ({"v": [0.0]}, "expected one entry per token"),
        ({"reward": None}, "reward is None; expected a list"),
        ({"reward": [float("nan"), 0.0]}, "found the number NaN; expected finite ones"),
    ],
)
def test_damaged_lines_are_refused_by_number(line, problem, respond, tmp_path):
    whole = respond(["a", "b"], [0.1, 0.2]).to_json()
    damaged = line if isinstance(line, bytes) else json.dumps(whole | line).encode()
    (path := tmp_path / "scores.jsonl").write_bytes(json.dumps(whole).encode() + b"\n" + damaged + b"\n")
    with pytest.raises(InputError, match=rf"scores\.jsonl line 2: not a line of `qstar score` \(.*{problem}"):
        read_scores(path)


def test_json_round_trip(respond):
    response = respond(["Hel", "lo", "<eos>"], [0.25, -1.5, 0.5], role="chosen", truncated=True)
    line = json.dumps(response.to_json())
    assert ScoredResponse.from_json(json.loads(line)) == response
    assert json.loads(line)["total_reward"] == pytest.approx(-0.75)


def test_json_takes_numpy_numbers(respond):
    response = respond(["a", "b"], [0.5, 1.0])
    from_arrays = dataclasses.replace(
        response, reward=tuple(np.float32([0.5, 1.0])), token_ids=tuple(np.int32([100, 101]))
    )
    assert json.loads(json.dumps(from_arrays.to_json())) == response.to_json()


def test_uneven_fields_are_refused(respond):
    with pytest.raises(ValueError, match=r"row 0, answer: .*'pieces': 1.*'reward': 2"):
        dataclasses.replace(respond(["a", "b"], [0.0, 0.0]), pieces=("ab",))


def test_running_reward_ends_at_the_total(respond):
    response = respond(["a", "b", "c"], [1.0, -3.0, 0.5])
    assert response.running_reward == (1.0, -2.0, -1.5)
    assert response.total_reward == -1.5


def test_turns_by_hand(dialogue):
    assert [dataclasses.astuple(turn) for turn in dialogue.turns] == [
        (0, "Red?<eos>", 2, 0.75, 0.75),
        (1, "Red{{ 7*7 }}<b><eos>", 3, -1.125, -0.375),
    ]
    line = json.loads(json.dumps(dialogue.to_json()))
    assert line["turns"] == [
        {"turn": 0, "actions": 2, "reward": 0.75, "value": 0.75},
        {"turn": 1, "actions": 3, "reward": -1.125, "value": -0.375},
    ]
    assert ScoredResponse.from_json(line) == dialogue
    # What is not learned has no reward, and a turn of which nothing is learned is none.
    last = dataclasses.replace(dialogue, action_mask=(False,) * 3 + (True,) * 3)
    assert [turn.turn for turn in last.turns] == [1]


def test_turns_are_the_steps_of_the_theory(respond):
    rng = np.random.default_rng(0)
    for length in (1, 7, 40):
        turn = np.sort(rng.integers(0, 5, length))
        mask = rng.random(length) < 0.6
        rewards = np.where(mask, rng.normal(size=length), 0.0)
        response = respond(["a"] * length, rewards.tolist())
        response = dataclasses.replace(response, action_mask=tuple(mask.tolist()), turn=tuple(turn.tolist()))
        steps = np.asarray(step_rewards(rewards.astype(np.float32), mask, turn, num_steps=5))
        numbers = [t.turn for t in response.turns]
        assert numbers == sorted(set(turn[mask]))
        np.testing.assert_allclose([t.reward for t in response.turns], steps[numbers], atol=1e-5)
        np.testing.assert_allclose([t.value for t in response.turns], steps.cumsum()[numbers], atol=1e-5)
        assert sum(t.actions for t in response.turns) == mask.sum()


def test_rows_keep_their_order_and_pairs_have_a_margin(respond):
    chosen = respond(["a"], [0.5], role="chosen", row=7)
    other = respond(["c"], [9.0], row=2)
    rejected = respond(["b"], [-1.0], role="rejected", row=7)
    assert by_row([chosen, other, rejected]) == [[chosen, rejected], [other]]
    assert pair_margin([rejected, chosen]) == 1.5
    assert pair_margin([other]) is None
    assert pair_margin([chosen, chosen]) is None


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as in the hardest parts of a byte-level vocabulary, and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def test_pieces_hold_whole_characters(byte_tokenizer):
    ids = [*byte_tokenizer("a 😀é\n")["input_ids"], byte_tokenizer.eos_token_id]
    assert token_pieces(ids, byte_tokenizer) == ("a", " ", "", "", "", "😀", "", "é", "\n", "<|im_end|>")


def test_pieces_spell_the_text_even_where_bytes_are_broken(byte_tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, 256, size=60)
        pieces = token_pieces(ids, byte_tokenizer)
        assert len(pieces) == 60
        assert "".join(pieces) == byte_tokenizer.decode(ids.tolist())


def test_no_tokens_have_no_pieces(byte_tokenizer):
    assert token_pieces([], byte_tokenizer) == ()


def test_pieces_keep_spaces_where_the_first_token_loses_its_own():
    words = ["<unk>", "▁Hello", "▁world", "s"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert token_pieces([1, 2, 3, 2], wrapped) == ("Hello", " world", "s", " world")


def test_windows_stay_short(byte_tokenizer):
    longest = 0

    class Watched:
        def decode(self, token_ids, **options):
            nonlocal longest
            longest = max(longest, len(token_ids)) if len(token_ids) < len(ids) else longest
            return byte_tokenizer.decode(token_ids, **options)

    ids = byte_tokenizer("naïve 😀 " * 40)["input_ids"] + [byte_tokenizer.convert_tokens_to_ids("Ń")] * 40
    token_pieces(ids, Watched())
    assert longest <= 12


def test_alternatives_survive_json_and_old_lines_have_none(respond):
    places = ((Alternative(" two", -0.5, 0.25), Alternative("<b>", -2.0, -1.0)), (Alternative("\n", -0.125, 0.0),))
    response = dataclasses.replace(respond(["a", "b"], [0.5, 1.0]), alternatives=places)
    line = json.loads(json.dumps(response.to_json()))
    assert line["alternatives"][1] == [{"piece": "\n", "logp": -0.125, "reward": 0.0}]
    assert ScoredResponse.from_json(line) == response
    del line["alternatives"]
    assert ScoredResponse.from_json(line).alternatives == ()
    with pytest.raises(ValueError, match="'alternatives': 1"):
        dataclasses.replace(response, alternatives=places[:1])


def test_a_lone_piece_keeps_its_space(byte_tokenizer):
    words = ["<unk>", "▁Hello", "s"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert [lone_piece(token, wrapped) for token in (1, 2)] == [" Hello", "s"]
    assert lone_piece(byte_tokenizer.eos_token_id, byte_tokenizer) == "<|im_end|>"
    assert [lone_piece(token, byte_tokenizer) for token in byte_tokenizer("é ")["input_ids"]] == [
        "\ufffd",
        "\ufffd",
        " ",
    ]
