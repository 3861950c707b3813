"""The views of dialogue."""

from dataclasses import replace

from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.insights.dialogue import facts, panels, print_dialogue, tables
from qstar_jax.report.numbers import MINUS
from qstar_jax.report.panel import sheet_figure


def test_panels_show_honest_games_and_both_kinds_of_credit(questions):
    returns, wasted, masks, areas, luck = panels(questions)
    assert "DPO on turns, greedy 0.76 [0.64, 0.88]" in returns.alt and "noisy" not in returns.alt
    assert "fitted player, sampled 0.21 [0.19, 0.23]" in wasted.alt
    assert "turn reward, DPO on turns 0.88" in areas.alt and "log pi_ref 0.77" in areas.alt
    assert f"sampled {MINUS}0.05 [{MINUS}0.07, {MINUS}0.03]" in masks.alt and f"greedy {MINUS}0.02" in masks.alt
    assert "noisy answers: with sums of advantages 0.82 [0.79, 0.85]" in luck.alt
    axes = sheet_figure([returns, wasted, areas], "dark").axes
    assert [text.get_text() for text in axes[0].get_yticklabels()] == [
        "fitted player",
        "DPO on turns",
        "DPO on replies\ntoo",
    ]
    optimum = axes[0].lines[0]
    assert optimum.get_label() == "optimum" and set(optimum.get_xdata()) == {0.762}
    assert len(axes[0].containers) == 3  # one series per decoder
    assert [text.get_text() for text in axes[2].get_yticklabels()] == ["honest answers", "noisy answers"]


def test_captions_say_what_training_changed_or_that_it_changed_nothing(questions):
    captions = [panel.finding for panel in panels(questions)]
    assert captions == [
        f"DPO on turns raises the return: 0.36 after {MINUS}0.10.",
        "DPO on turns lowers the share of wasted questions: 0.16 after 0.21.",
        "Training on turns alone is worse than training on replies too: -0.05 [-0.07, -0.03] in return.".replace(
            "-", MINUS
        ),
        "Turn rewards find wasted questions better than log pi_ref does: AUC 0.88 and 0.77.",
        "Margins follow sums of advantages more closely than returns, which have luck: correlation 0.82 and 0.45.",
    ]
    nothing = {"DPO on turns - fitted player": Interval(0.0, -0.1, 0.1)}
    differences = {"return": questions.differences["return"] | nothing, "wasted questions": nothing}
    same = tuple(replace(c, wasted_auc=questions.credit[1].wasted_auc) for c in questions.credit)
    luck = (replace(questions.luck[0], with_advantages=questions.luck[0].with_returns),)
    captions = [p.finding for p in panels(replace(questions, differences=differences, credit=same, luck=luck))]
    assert "does not change the return beyond noise" in captions[0] and "beyond noise" in captions[1]
    assert "no better than" in captions[3] and "as closely as" in captions[4]


def test_tables_name_players_scores_luck_and_differences(questions):
    games, credit, luck, *differences = tables(questions)
    assert games.rows[0][:2] == ("fitted player, sampled", f"{MINUS}0.10 [{MINUS}0.22, 0.02]")
    assert games.rows[-1][0] == "DPO, noisy answers, sampled, of noisy answerers"
    assert credit.rows[-1] == ("turn reward, DPO, noisy answers, noisy", "0.51 [0.49, 0.53]", "0.71 [0.68, 0.74]")
    assert luck.rows[1] == ("noisy", "0.93 [0.83, 1.03]", "0.45 [0.35, 0.55]", "0.82 [0.79, 0.85]")
    assert [table.caption for table in differences] == ["Differences in return", "Differences in wasted questions"]
    assert differences[0].rows[1][1] == f"{MINUS}0.05 [{MINUS}0.07, {MINUS}0.03]"
    assert tables(questions, brief=True)[0].rows[0][1] == f"{MINUS}0.10"


def test_facts_say_what_is_exact_and_how_much_was_played(questions):
    text = " ".join(facts(questions))
    assert "6,400 pairs" in text and f"player {MINUS}0.06, the optimum 0.76" in text
    assert "512 sampled games, 16 greedy or by beams" in text


def test_all_is_printed_in_80_columns(questions, printed):
    text = printed(print_dialogue, questions)
    assert "+0.46 [+0.38, +0.54]" in text and max(map(len, text.splitlines())) <= 80


def test_masks_are_judged_in_words(questions):
    assert "turns alone is worse than training on replies too: -0.05" in questions.finding().measured
    assert replace(questions, seed=1).finding().reproduced is True
