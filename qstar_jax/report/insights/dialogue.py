"""Dialogue: what DPO on whole dialogues teaches a player of the game of questions."""

from functools import partial

from rich.console import Console

from qstar_jax.evaluation.insights.dialogue import GREEDY, SAMPLED, Dialogue, Games, TurnCredit
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import decimal, signed_interval, with_interval
from qstar_jax.report.panel import Panel
from qstar_jax.report.tables import Table, cell, print_table

# Measure of the record -> its heading
_MEASURES = {
    "returns": "return",
    "success": "found",
    "questions": "questions",
    "bits": "bits per question",
    "wasted": "wasted",
}


def panels(dialogue: Dialogue) -> list[Panel]:
    """Shows the return of each policy, its wasted questions, and how well scores of turns find them."""
    shown = [
        _games_panel(dialogue, "returns", "Return of a game", dialogue.optimum, "optimum"),
        _games_panel(dialogue, "wasted", "Wasted questions", 0.0, None),
    ]
    areas = {
        f"{'noisy' if noisy else 'honest'} answers": {
            _score_name(c): c.wasted_auc for c in dialogue.credit if c.noisy is noisy
        }
        for noisy in (False, True)
    }
    words = "; ".join(f"{_score_name(c)} {with_interval(c.wasted_auc)}" for c in dialogue.credit if not c.noisy)
    draw = partial(draw_dots, groups=areas, series=_scores(dialogue), label="AUC", line=0.5, line_label="chance")
    alt = f"Area under the curve of low scores as detectors of wasted questions, honest answers: {words}."
    return [*shown, Panel("Finding wasted questions", alt, draw, 2.6)]


def _games_panel(dialogue: Dialogue, measure: str, title: str, line: float, line_label: str | None) -> Panel:
    honest = [games for games in dialogue.games if not games.noisy]
    groups: dict[str, dict] = {}
    for games in honest:
        groups.setdefault(games.policy, {})[games.decoder] = getattr(games, measure)
    series = list(dict.fromkeys(games.decoder for games in honest))
    words = "; ".join(f"{_name(games)} {with_interval(getattr(games, measure))}" for games in honest)
    draw = partial(draw_dots, groups=groups, series=series, label=title.lower(), line=line, line_label=line_label)
    return Panel(title, f"{title}: {words}.", draw, 0.7 + 0.6 * len(groups))


def tables(dialogue: Dialogue, *, brief: bool = False) -> list[Table]:
    """How every policy plays, how scores of turns agree with exact advantages, luck, and differences.

    `brief` leaves out the intervals of games, for narrow terminals.
    """
    games = [(_name(one), *(cell(getattr(one, name), 2, lone=brief) for name in _MEASURES)) for one in dialogue.games]
    credit = [
        (
            _score_name(c) + (", noisy" if c.noisy else ""),
            with_interval(c.rank_correlation),
            with_interval(c.wasted_auc),
        )
        for c in dialogue.credit
    ]
    luck = [
        (
            "noisy" if one.noisy else "honest",
            with_interval(one.share),
            with_interval(one.with_returns),
            with_interval(one.with_advantages),
        )
        for one in dialogue.luck
    ]
    shown = [
        Table("Games" + ("" if brief else ", with 95 % intervals"), ("player", *_MEASURES.values()), tuple(games)),
        Table("Scores of turns", ("score", "rank correlation", "AUC of wasted questions"), tuple(credit)),
        Table(
            "Luck in differences of return, and what margins correlate with",
            ("answers", "variance of luck", "returns", "sums of advantages"),
            tuple(luck),
        ),
    ]
    for measure, differences in dialogue.differences.items():
        rows = tuple((name, signed_interval(value)) for name, value in differences.items())
        shown.append(Table(f"Differences in {measure}", ("comparison", "difference"), rows))
    return shown


def facts(dialogue: Dialogue) -> list[str]:
    """Names the settings, and what is known exactly."""
    games = {decoder: next(g.games for g in dialogue.games if g.decoder == decoder) for decoder in (SAMPLED, GREEDY)}
    return [
        f"seed {dialogue.seed}; beta {dialogue.beta:g}; {dialogue.pairs:,} pairs of dialogues",
        f"exact returns: the mediocre player {decimal(dialogue.player)}, the optimum {decimal(dialogue.optimum)}",
        f"{games[SAMPLED]:,} sampled games, {games[GREEDY]:,} greedy or by beams; bars: 95 % bootstrap intervals over "
        "things, or over pairs of held-out dialogues",
        "beams try several dialogues with one answerer, and the most likely one counts",
    ]


def print_dialogue(dialogue: Dialogue, console: Console | None = None):
    """Prints how the policies play, how well scores of turns find wasted questions, and the differences."""
    for table in tables(dialogue, brief=True):
        print_table(table, console)


def _name(games: Games) -> str:
    return f"{games.policy}, {games.decoder}" + (", of noisy answerers" if games.noisy else "")


def _score_name(credit: TurnCredit) -> str:
    return f"{credit.score}, {credit.policy}" if credit.policy else credit.score


def _scores(dialogue: Dialogue) -> list[str]:
    return list(dict.fromkeys(map(_score_name, dialogue.credit)))


VIEW = View(
    Dialogue,
    insight="dialogue",
    heading="Dialogue: asking questions",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_dialogue,
)
