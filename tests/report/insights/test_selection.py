import io

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from qstar_jax.evaluation.insights.selection import compute_selection
from qstar_jax.evaluation.step_search import compare_at_equal_tokens
from qstar_jax.evaluation.votes import Candidates
from qstar_jax.report.insights import write_figure
from qstar_jax.report.insights.selection import facts, panels, print_selection, tables


def questions_of(informed, count=60):
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        correct = rng.random(4) < 0.5
        scores = {"sum": informed * correct + rng.normal(size=4), "min": rng.normal(size=4)}
        found.append(Candidates(correct, [str(int(right)) for right in correct], scores))
    return found


@pytest.fixture(scope="module")
def informed():
    """Rewards that find the right response, a step search that does too, and names that must be escaped."""
    questions = questions_of(5.0)
    lengths = [np.full(4, 10)] * len(questions)
    drawn = np.full(len(questions), 25)
    search = compare_at_equal_tokens(np.ones(60, bool), drawn, questions, lengths, beams=2, samples=2)
    names = {"model": "runs/\u202eprm [bold]", "reference": "base", "beta": 0.05}
    return compute_selection(questions, search=[search], disagreements=3, **names)


def test_captions_say_what_was_found(informed):
    first, gains, areas, search = panels(informed)
    assert "beats the majority" in first.finding and "Best of 4 by sum" in first.finding
    assert gains.finding.startswith("The most is gained with best by sum: +0.")
    assert areas.finding == "Within questions, sum tells right from wrong best: AUC 1.000 [1.000, 1.000]."
    assert "step search gains most with 2 beams of 2 against majority" in search.finding
    zeros = {"sum": np.zeros(4)}
    knows_nothing = compute_selection([Candidates(q.correct, q.answers, zeros) for q in questions_of(0.0)])
    first, gains, areas = panels(knows_nothing)
    assert "cannot be told from the majority" in first.finding
    assert gains.finding == "No way to select gains on the majority beyond noise."
    assert "cannot be told from chance" in areas.finding
    one_each = [Candidates(np.array([right]), ["1"], {"sum": np.array([float(right)])}) for right in (True, False)]
    *_, areas = panels(compute_selection(one_each, sizes=[1]))
    assert areas.finding.startswith("Over all responses, sum")
    without_scores = compute_selection([Candidates(q.correct, q.answers) for q in questions_of(0.0)])
    (votes,) = panels(without_scores)
    assert votes.finding.startswith("The majority (")
    weighs = "votes by a score weigh sigmoid(score)"
    assert weighs in facts(informed) and weighs not in facts(without_scores)


def test_tables_and_facts_have_every_number(informed, tmp_path):
    accuracy, gains, areas, search = tables(informed)
    assert accuracy.columns == ("method", "N 1", "N 2", "N 4")
    assert [row[0] for row in accuracy.rows] == list(informed.methods)
    assert all("[" in cell for row in accuracy.rows for cell in row[1:])
    assert gains.rows[0][0] == "majority" and gains.rows[0][2] == "\N{EN DASH}"
    assert len(areas.rows) == 2 and search.rows[0][:3] == ("2 beams of 2", "25", "2.5")
    assert any("3 labels of the file contradict" in fact for fact in facts(informed))
    console = Console(file=io.StringIO(), width=80)
    print_selection(informed, console)
    text = console.file.getvalue()
    assert "[bold]" in text and "\u202e" not in text and "best by min" in text
    assert "2 beams of 2 " in text, "a step search has a line, also in a narrow terminal"
    assert imread(write_figure(informed, tmp_path)).shape[1] > 700
