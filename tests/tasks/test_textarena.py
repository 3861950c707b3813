"""The package's games as dialogues, with players whose returns are known."""

import itertools
import random
import re
import sys

import pytest

from qstar_jax.errors import InputError
from qstar_jax.tasks.textarena import Game


@pytest.fixture
def textarena():
    return pytest.importorskip("textarena", reason="games need the extra `textarena`")


def secret(seed):
    """The number that GuessTheNumber-v0 draws."""
    return random.Random(seed).randint(1, 20)


def finish(game, turns=()):
    """Says the turns, or bisects; returns the numbers that it said."""
    said, low, high = [], 1, 20
    turns = iter(turns)
    while game.reward is None:
        number = next(turns, (low + high) // 2)
        game.say(f"I say [{number}].")
        said.append(number)
        reply = game.messages[-1]["content"]
        low, high = (number + 1, high) if "higher" in reply else (low, number - 1)
    return said


def test_a_bisecting_player_always_finds_the_number(textarena):
    for seed in range(8):
        game = Game("GuessTheNumber-v0", seed)
        assert finish(game)[-1] == secret(seed) and game.turns <= 5
        assert game.reward == 1 and game.reason.startswith("Congratulations")
        roles = [message["role"] for message in game.messages]
        assert roles == ["user", "assistant"] * game.turns
    # The rules are said once, and the game's replies are short.
    rules, *replies = [message["content"] for message in game.messages if message["role"] == "user"]
    assert "between 1 and 20" in rules and not rules.startswith("[")
    assert all(re.fullmatch(r"The target number is (higher|lower)\.", reply) for reply in replies)


def test_a_player_that_repeats_itself_gets_what_its_distance_is_worth(textarena):
    seeds = [seed for seed in range(9) if secret(seed) != 1]
    for seed in seeds:
        game = Game("GuessTheNumber-v0", seed)
        finish(game, itertools.repeat(1))
        assert game.turns == 3 and game.reward == pytest.approx(1 - (secret(seed) - 1) / 19)
    assert len({secret(seed) for seed in seeds}) > 3


def test_mastermind_is_cracked_by_elimination(textarena):
    game, codes = Game("Mastermind-v0", 5), list(itertools.permutations(range(1, 7), 4))
    while game.reward is None:
        guess = codes[0]
        game.say(f"[{' '.join(map(str, guess))}]")
        if game.reward is None:
            black, white = map(int, re.findall(r"(\d) (?:black|white)", game.messages[-1]["content"]))
            codes = [c for c in codes if c != guess and pegs(c, guess) == (black, white)]
    assert game.reward == 1 and 1 < game.turns < 12
    silent = Game("Mastermind-v0", 5)
    while silent.reward is None:
        silent.say("no idea")
    assert silent.reward == 0 and silent.reason.startswith("Invalid Move")


def pegs(code, guess):
    black = sum(a == b for a, b in zip(code, guess, strict=True))
    return black, len({*code} & {*guess}) - black


def test_games_that_are_played_together_do_not_disturb_each_other(textarena):
    def frozen_lake(turns_of_another):
        game = Game("FrozenLake-v0", 3)
        other = Game("FrozenLake-v0", 4)
        for direction in ("[right]", "[down]"):
            if turns_of_another:
                other.say("[left]")
                random.random()
            game.say(direction)
        return game.messages

    assert frozen_lake(False) == frozen_lake(True)
    random.seed(1)
    expected = random.random()
    random.seed(1)
    Game("Mastermind-v0", 0).say("[1 2 3 4]")
    assert random.random() == expected


def test_games_that_there_are_not(textarena, monkeypatch):
    with pytest.raises(InputError, match=r"GuessTheNumbr-v0: .* no such game; the nearest: GuessTheNumber-v0"):
        Game("GuessTheNumbr-v0", 0)
    with pytest.raises(InputError, match="TicTacToe-v0 is not a game of one player"):
        Game("TicTacToe-v0", 0)


def test_a_game_without_its_data_is_refused(textarena, monkeypatch):
    def missing(*_, **__):
        raise LookupError("\n  Resource words\n not found")

    monkeypatch.setattr(textarena, "make", missing)
    with pytest.raises(
        InputError, match="Wordle-v0 lacks data that textarena would download: Resource words not found"
    ):
        Game("Wordle-v0", 0)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(InputError, match=r"pip install 'qstar_jax\[textarena\]'"):
        Game("GuessTheNumber-v0", 0)
