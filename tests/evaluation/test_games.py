"""Games of a model with the answerers of tiny-questions, and what is counted in them."""

import numpy as np
import pytest

from qstar_jax.demo.pretrain import initial_params
from qstar_jax.evaluation.games import Decoder, describe_games, play
from qstar_jax.models import CausalLM
from qstar_jax.store.open import LoadedModel
from qstar_jax.tasks.tiny_questions.game import ATTRIBUTES, NOISE, THINGS, TURNS, Game, ask, guess, parse, reply
from qstar_jax.tasks.tiny_questions.played import Played
from qstar_jax.tasks.tiny_questions.tokenizer import make_tokenizer

SAMPLED = Decoder("sampled", games=3, temperature=1.0)


@pytest.fixture(scope="module")
def player(tmp_path_factory):
    """A random model that is biased towards words of the game, so that some of its turns are questions and guesses."""
    tokenizer = make_tokenizer("<eos>")
    keys = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    model = CausalLM.from_hf(keys)
    return LoadedModel(model, initial_params(model, 0), tokenizer, tmp_path_factory.mktemp("player"))


@pytest.mark.parametrize("noise", [0.0, NOISE])
def test_games_follow_the_rules(player, noise):
    game, things = Game(4, noise), [2, 9]
    games = play(player, game, things, SAMPLED, seed=0)
    assert [one.thing for one in games] == [2, 2, 2, 9, 9, 9]
    for one in games:
        ended = (parse(one.turns[-1]) or 0) >= len(ATTRIBUTES)
        assert 1 <= len(one.turns) <= TURNS and len(one.replies) == len(one.turns) - 1
        assert ended or len(one.turns) == TURNS
        if noise == 0:
            truth = game.features[one.thing]
            assert list(one.replies) == [reply(truth, one.turns[:n]) for n in range(1, len(one.turns))]


@pytest.mark.slow
def test_samples_follow_the_seed_and_greedy_games_and_beams_do_not(player):
    def turns(decoder, seed):
        return [one.turns for one in play(player, Game(), range(4), decoder, seed=seed)]

    assert turns(SAMPLED, 0) == turns(SAMPLED, 0) != turns(SAMPLED, 1)
    greedy, beams = Decoder("greedy"), Decoder("beams", beams=4)
    assert turns(greedy, 0) == turns(greedy, 1) != turns(beams, 0) == turns(beams, 1)


def test_the_tokens_that_are_played_are_those_of_the_chat_template(player, monkeypatch):
    seen = []

    def converse(model, params, prompt, rows, environment, options, key):
        end = player.tokenizer.convert_tokens_to_ids("<end>")
        turn = (*player.tokenizer(ask(1)).input_ids, end)
        seen.append(list(prompt) + list(turn) + list(environment(0, (turn,))))
        return [[type("Dialogue", (), {"turns": (turn,)})] for _ in range(rows)]

    monkeypatch.setattr("qstar_jax.evaluation.games.converse", converse)
    play(player, Game(), [0], Decoder("greedy"), seed=0)
    answer = "yes" if Game().features[0, 1] else "no"
    messages = [("user", "what is it ?"), ("assistant", ask(1)), ("user", answer)]
    messages = [{"role": role, "content": content} for role, content in messages]
    text = player.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert seen == [player.tokenizer(text).input_ids]


def test_counts_by_hand():
    game = Game()

    def played(thing, *turns):
        return Played(thing, turns, tuple(str(reply(game.features[thing], turns[:n])) for n in range(1, len(turns))))

    games = [played(0, ask(0), ask(0), guess(0)), played(0, guess(1)), played(1, ask(0), guess(1))]
    found = describe_games(games, "someone", "somehow", False, game)
    assert found.games == 3 and not found.noisy
    assert found.returns.mean == pytest.approx((0.9 - 1 + 0.95) / 3)
    assert found.success.mean == pytest.approx(2 / 3) and found.questions.mean == pytest.approx(1.0)
    assert found.wasted.mean == pytest.approx(1 / 3)
    alike = [(game.features[:, 0] == game.features[thing, 0]).sum() for thing in (0, 1)]
    assert found.bits.mean == pytest.approx(sum(np.log2(len(THINGS) / count) for count in alike) / 3)
    # Things are resampled with all their games.
    assert found.returns.low == pytest.approx(-0.05) and found.returns.high == pytest.approx(0.95)
