"""Games that a model, or a scripted player, plays to their ends."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from qstar_jax.cli.main import main
from qstar_jax.cli.play import games_table
from qstar_jax.config import DataOptions, PlayConfig
from qstar_jax.data.preferences import label_records, preference_records, return_records
from qstar_jax.evaluation.play import pairs_of, play_games, returns_by_seed
from qstar_jax.store import hub

CONFIG = PlayConfig(model="m", out="o", max_turns=4)


class Countdown:
    """A game that ends once the player has said "stop": its return is the number of turns before."""

    def __init__(self):
        self.messages, self.reward, self.turns, self.reason = [{"role": "user", "content": "go"}], None, 0, ""

    def say(self, text):
        self.messages.append({"role": "assistant", "content": text})
        self.turns += 1
        if text == "stop":
            self.reward, self.reason = float(self.turns - 1), "You stopped. Really."
        else:
            self.messages.append({"role": "user", "content": "more?"})


def played(*stops, **options):
    """Rows of games that stop after so many turns; None: the player has no room for a second turn."""
    seen = []

    def speak(dialogues, keys):
        seen.append(list(keys))
        games = [key // config.max_turns for key in keys]
        turns = [len(messages) // 2 for messages in dialogues]
        return [
            None if stops[game] is None and turn else (("stop", False) if turn == stops[game] else ("on", True))
            for game, turn in zip(games, turns, strict=True)
        ]

    config = replace(CONFIG, **options)
    games = [Countdown() for _ in stops]
    return play_games(games, [n // 2 for n in range(len(stops))], speak, config), seen


def test_games_end_apart_and_keep_their_keys():
    rows, keys = played(0, 2, 1, 9, None)
    assert [row["reward"] for row in rows] == [0.0, 2.0, 1.0, None, None]
    assert [row["turns"] for row in rows] == [1, 3, 2, 4, 1]
    assert [row["truncated_turns"] for row in rows] == [0, 2, 1, 4, 1]
    assert keys == [[0, 4, 8, 12, 16], [5, 9, 13, 17], [6, 14], [15]]
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert [row["label"] for row in rows] == [False, True, True, None, None]
    assert [row["label"] for row in played(0, 2, 1, win=2.0)[0]] == [False, True, False]
    assert played(2, max_turns=2)[0][0]["reward"] is None


def test_pairs_are_the_best_and_the_worst_of_a_secret():
    rows, _ = played(0, 2, 1, 1, None, 0)
    [pair] = pairs_of(rows)
    assert (pair["chosen"], pair["rejected"], pair["seed"]) == (rows[1]["messages"], rows[0]["messages"], 0)
    np.testing.assert_equal(returns_by_seed(rows), [1.0, 1.0, 0.0])
    table = games_table("Countdown", rows)
    assert ("You stopped", "5") in table.rows and table.rows[0][1].startswith("0.667")


def test_rows_are_labels_and_returns():
    rows, _ = played(0, 2, 1, 2)
    records, dropped = label_records(rows, DataOptions(), "games.jsonl")
    assert [record.label for record in records] == [False, True, True, True] and not dropped
    # All games begin alike, so their returns stand for the reference's.
    records, dropped = return_records(rows, DataOptions(), "games.jsonl")
    assert not dropped and {record.reference_rewards for record in records} == {(0.0, 2.0, 1.0, 2.0)}
    records, dropped = preference_records(pairs_of(rows), DataOptions(), "pairs.jsonl")
    lengths = [[len(response) for response in record.responses] for record in records]
    assert lengths == [[5, 1], [3, 1]] and not dropped  # the second pair shares a turn


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, tiny_model, tiny_params, tiny_tokenizer):
    """The tiny model, which says words, with a chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    folder = tmp_path_factory.mktemp("chat") / "model"
    hub.write_folder(folder, tiny_model, tiny_params, tokenizer, "float32")
    return folder


@pytest.fixture(scope="module")
def games(tmp_path_factory, chat_folder, on_devices):
    """`games(*words)`: rows of a folder in which the tiny model played; `games(...)[0]` is the folder."""
    pytest.importorskip("textarena", reason="games need the extra `textarena`")

    def make(*words):
        out = tmp_path_factory.mktemp("games") / "out"
        command = ["play", "--model", str(chat_folder), "--out", str(out), "--decode.max_new_tokens", "4"]
        with on_devices(1):
            assert main([*command, *words]) == 0
        return out, [json.loads(line) for line in (out / "games.jsonl").read_text().splitlines()]

    return make


SAMPLED = ("--games", "3", "--repeats", "2", "--decode.method", "sample")


@pytest.mark.slow
def test_a_model_plays(games, capsys):
    out, rows = games(*SAMPLED, "--batch_size", "4")
    printed = capsys.readouterr().out
    # Words are no numbers: the second invalid move ends the game.
    assert [row["reward"] for row in rows] == [0.0] * 6 and [row["turns"] for row in rows] == [2] * 6
    assert [row["seed"] for row in rows] == [0, 0, 1, 1, 2, 2] and "Invalid Move" in printed
    turns = [row["messages"][1]["content"] for row in rows]
    assert len(set(turns)) == 6 and all(re.fullmatch(r"(w\d+ ?)*", turn) for turn in turns)
    assert (out / "pairs.jsonl").read_text() == "" and "pairs: 0" in printed
    # Games do not depend on those that are played with them, but on their seed.
    assert games(*SAMPLED, "--batch_size", "3")[1] == rows
    assert games(*SAMPLED, "--decode.seed", "1")[1] != rows


def test_a_dialogue_without_room_is_stopped(games, capsys):
    _, rows = games("--games", "1", "--max_length", "6")
    assert rows[0]["reward"] is None and rows[0]["turns"] == 0 and "were stopped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "2"], "plays the same game again"),
        (["--games", "0"], "--games 0: expected at least 1"),
        (["--decode.method", "best_of_n"], "by the policy alone"),
        (["--max_length", "4"], "leaves no room"),
    ],
)
def test_options_that_contradict_each_other(words, message, tmp_path, chat_folder, capsys):
    command = ["play", "--model", str(chat_folder), "--out", str(tmp_path), "--decode.max_new_tokens", "4"]
    assert main([*command, *words]) == 2 and message in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused(tmp_path, hf_folder, capsys):
    pytest.importorskip("textarena", reason="games need the extra `textarena`")
    assert main(["play", "--model", str(hf_folder), "--out", str(tmp_path / "out")]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_games_are_not_overwritten(tmp_path, chat_folder, capsys):
    (tmp_path / "games.jsonl").write_text("")
    assert main(["play", "--model", str(chat_folder), "--out", str(tmp_path)]) == 2
    assert "exists; choose another --out" in capsys.readouterr().err
