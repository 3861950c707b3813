"""What is measured of dialogues, with rewards that are known."""

from dataclasses import replace

import numpy as np
import pytest

from qstar_jax.evaluation.insights import dialogue
from qstar_jax.evaluation.insights.dialogue import (
    ALL,
    BEAMS,
    CEILING,
    GREEDY,
    NOISY,
    PLAYER,
    REFERENCE,
    RETURN,
    REWARD,
    SAMPLED,
    TURNS,
    WASTED,
    Dialogue,
    HeldOut,
    measure_dialogue,
)
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.tasks.tiny_questions.beliefs import Beliefs, solve
from qstar_jax.tasks.tiny_questions.game import NOISE, Game
from qstar_jax.tasks.tiny_questions.played import Played
from qstar_jax.tasks.tiny_questions.rows import TEMPERATURE, split_rows

BETA = 0.3


def scored(row, index, name, rewards, shared=0):
    """A dialogue of one action per turn, with a reply between; `shared` turns are part of the prompt."""
    turns = Played.from_row(row, name).turns[shared:]
    tokens = range(2 * len(turns) - 1)
    actions = [t % 2 == 0 for t in tokens]
    of_turn = lambda values: tuple(float(values[shared + t // 2]) if t % 2 == 0 else 0.0 for t in tokens)  # noqa: E731
    zeros = (0.0,) * len(tokens)
    return ScoredResponse(
        row=index,
        role=name,
        prompt="",
        pieces=("x",) * len(tokens),
        token_ids=tuple(tokens),
        logp=zeros,
        ref_logp=of_turn(-np.arange(1.0, 9.0)),
        reward=of_turn(rewards),
        q=zeros,
        v=zeros,
        truncated=False,
        beta=BETA,
        action_mask=tuple(actions),
        turn=tuple(t // 2 if t % 2 == 0 else -1 for t in tokens),
    )


def held_out(policy, noisy, score):
    """Dialogues whose turns have the rewards `score(played)`; the first turn of every third row is shared."""
    rows = split_rows("noisy_test" if noisy else "test", 0, 120)
    responses = [
        scored(row, index, name, score(Played.from_row(row, name)), shared=int(same_start(row) and index % 3 == 0))
        for index, row in enumerate(rows)
        for name in ("chosen", "rejected")
    ]
    return HeldOut(policy, rows, responses, noisy)


def same_start(row):
    return row["chosen"][0] == row["rejected"][0] and min(len(row["chosen"]), len(row["rejected"])) > 1


def optimal(noisy=False):
    values = solve(Game(0, NOISE if noisy else 0.0), BETA * TEMPERATURE)
    return lambda played: played.advantages(values) / TEMPERATURE


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Measured of policies that play as the rows do: the trained ones as the chosen dialogues, the player as both."""
    rows = {noisy: split_rows("noisy" if noisy else "train", 0, 400) for noisy in (False, True)}

    def play(name, game, things, decoder, *, seed):
        columns = ("chosen", "rejected") if name == PLAYER else ("chosen",)
        return [Played.from_row(row, column) for row in rows[game.noise > 0] for column in columns]

    out, patch = tmp_path_factory.mktemp("dialogue"), pytest.MonkeyPatch()
    patch.setattr(dialogue, "play", play)
    measured = measure_dialogue(
        {name: name for name in (PLAYER, TURNS, ALL, NOISY)},
        [
            held_out(TURNS, False, optimal()),
            held_out(ALL, False, lambda played: -optimal()(played)),
            held_out(NOISY, True, optimal(noisy=True)),
        ],
        seed=0,
        beta=BETA,
        pairs=400,
        games_per_thing=1,
        out=out,
    )
    patch.undo()
    assert Dialogue.read(out) == measured
    return measured


def test_rewards_that_are_the_advantages_agree_with_them(record):
    best, worst = record.credit_of(REWARD, TURNS), record.credit_of(REWARD, ALL)
    ceiling, reference = record.credit_of(CEILING), record.credit_of(REFERENCE)
    assert best.rank_correlation.mean == pytest.approx(1.0) and worst.rank_correlation.mean == pytest.approx(-1.0)
    assert best.wasted_auc == ceiling.wasted_auc and best.wasted_auc.mean > 0.95
    assert worst.wasted_auc.mean == pytest.approx(1 - best.wasted_auc.mean)
    assert reference.wasted_auc.mean > 0.5  # later questions are wasted more often, and here less likely
    gain = record.differences[dialogue.AUC][f"{TURNS} - {REFERENCE}"]
    assert gain.mean == pytest.approx(best.wasted_auc.mean - reference.wasted_auc.mean)
    assert gain.high - gain.low < (best.wasted_auc.high - best.wasted_auc.low) + (
        reference.wasted_auc.high - reference.wasted_auc.low
    )


def test_luck_is_what_advantages_do_not_explain(record):
    honest, noisy = record.luck
    assert (honest.policy, honest.noisy, noisy.policy, noisy.noisy) == (TURNS, False, NOISY, True)
    for luck in record.luck:
        assert luck.with_advantages.mean == pytest.approx(1.0) and luck.with_returns.high < 0.95
    assert noisy.share.mean > honest.share.mean > 0.2 and noisy.with_returns.mean < honest.with_returns.mean


def test_games_are_compared_by_thing(record):
    same, gain = (record.differences[RETURN][f"{TURNS} - {other}"] for other in (ALL, PLAYER))
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    assert gain.mean == pytest.approx(record.of(TURNS).returns.mean - record.of(PLAYER).returns.mean) and gain.low > 0
    assert record.differences[RETURN][f"{TURNS}, {GREEDY} - {SAMPLED}"].mean == 0.0
    assert {(g.decoder, g.noisy) for g in record.games} == {
        *((decoder, False) for decoder in (SAMPLED, GREEDY, BEAMS)),
        (SAMPLED, True),
    }
    assert record.player < 0 < record.optimum


@pytest.mark.parametrize(
    ("gain", "wasted", "masks", "reproduced", "words"),
    [
        (0.4, -0.1, 0.1, True, "turns alone beats"),
        (0.4, -0.1, 0.0, True, "cannot be told apart"),
        (0.4, 0.0, -0.1, None, "turns alone is worse"),
        (0.4, 0.1, 0.0, False, "cannot be told apart"),
        (-0.4, -0.1, 0.0, False, "cannot be told apart"),
    ],
)
def test_the_verdict_follows_the_numbers(record, gain, wasted, masks, reproduced, words):
    around = lambda mean: Interval(mean, mean - 0.05, mean + 0.05)  # noqa: E731
    differences = {
        RETURN: {f"{TURNS} - {PLAYER}": around(gain), f"{TURNS} - {ALL}": around(masks)},
        WASTED: {f"{TURNS} - {PLAYER}": around(wasted)},
    }
    finding = replace(record, differences=differences).finding()
    assert finding.reproduced is reproduced and words in finding.measured
    assert f"{gain:+.2f} [" in finding.measured and finding.insight == "dialogue"


def test_labels_do_not_decide_in_which_order_pairs_are_compared(record):
    source = held_out(TURNS, False, optimal())
    other = {"chosen": "rejected", "rejected": "chosen"}
    rows = [row | {name: row[other[name]] for name in other} for row in source.rows]
    swapped = replace(source, rows=rows, scored=[replace(s, role=other[s.role]) for s in source.scored])
    found = [
        dialogue._Turns(one, Beliefs(Game()), solve(Game(), BETA * TEMPERATURE)).luck() for one in (source, swapped)
    ]
    assert found[0] == found[1] and found[0].with_returns == record.luck[0].with_returns
