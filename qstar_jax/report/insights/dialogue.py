"""Dialogue: what DPO on whole dialogues teaches a player of the game of questions."""

from functools import partial

from rich.console import Console

from qstar_jax.evaluation.insights.dialogue import (
    ALL,
    GREEDY,
    PLAYER,
    REFERENCE,
    RETURN,
    REWARD,
    SAMPLED,
    TURNS,
    WASTED,
    Dialogue,
    Games,
    TurnCredit,
)
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import MINUS, decimal, signed_interval, with_interval
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

_MASKS = f"{TURNS} - {ALL}"


def panels(dialogue: Dialogue) -> list[Panel]:
    """Shows how the policies play, what the masks gain, how well turns are judged, and what luck does to margins."""
    return [
        _games_panel(dialogue, "returns", "Return of a game", dialogue.optimum, "optimum"),
        _games_panel(dialogue, "wasted", "Wasted questions", 0.0, None),
        _masks_panel(dialogue),
        _credit_panel(dialogue),
        _luck_panel(dialogue),
    ]


def _masks_panel(dialogue: Dialogue) -> Panel:
    returns = dialogue.differences[RETURN]
    gains = {name.removeprefix(_MASKS).strip(", ") or SAMPLED: gain for name, gain in returns.items() if _MASKS in name}
    words = "; ".join(f"{name} {signed_interval(gain)}" for name, gain in gains.items())
    groups = {name: {"gain": gain} for name, gain in gains.items()}
    draw = partial(draw_dots, groups=groups, series=["gain"], label="gain in return", line=0.0)
    alt = f"Return after training on turns alone, minus that after training on replies too: {words}."
    finding = dialogue.compare_masks().replace("-", MINUS)
    return Panel("Turns alone, minus replies too", alt, draw, 0.7 + 0.6 * len(groups), finding)


def _credit_panel(dialogue: Dialogue) -> Panel:
    areas = {
        f"{_answers(noisy)} answers": {_score_name(c): c.wasted_auc for c in dialogue.credit if c.noisy is noisy}
        for noisy in (False, True)
    }
    words = "; ".join(f"{_score_name(c)} {with_interval(c.wasted_auc)}" for c in dialogue.credit if not c.noisy)
    draw = partial(draw_dots, groups=areas, series=_scores(dialogue), label="AUC", line=0.5, line_label="chance")
    alt = f"Area under the curve of low scores as detectors of wasted questions, honest answers: {words}."
    reward, reference = dialogue.credit_of(REWARD, TURNS).wasted_auc, dialogue.credit_of(REFERENCE).wasted_auc
    change = {1: "better than", 0: "no better than", -1: "less well than"}[reward.compare(reference)]
    finding = (
        f"Turn rewards find wasted questions {change} log pi_ref does: AUC {decimal(reward.mean)} and "
        f"{decimal(reference.mean)}."
    )
    return Panel("Finding wasted questions", alt, draw, 2.6, finding)


def _luck_panel(dialogue: Dialogue) -> Panel:
    groups = {
        f"{_answers(luck.noisy)} answers": {"sums of advantages": luck.with_advantages, "returns": luck.with_returns}
        for luck in dialogue.luck
    }
    words = "; ".join(
        f"{name}: with {one} {with_interval(value)}" for name, group in groups.items() for one, value in group.items()
    )
    series = ["sums of advantages", "returns"]
    draw = partial(draw_dots, groups=groups, series=series, label="correlation of margins", line=0.0)
    advantages, returns = dialogue.luck[0].with_advantages, dialogue.luck[0].with_returns
    change = {1: "more closely than", 0: "as closely as", -1: "less closely than"}[advantages.compare(returns)]
    finding = (
        f"Margins follow sums of advantages {change} returns, which have luck: correlation {decimal(advantages.mean)} "
        f"and {decimal(returns.mean)}."
    )
    return Panel("What margins of pairs follow", f"Correlation of margins, {words}.", draw, 2.6, finding)


def _answers(noisy: bool) -> str:
    return "noisy" if noisy else "honest"


def _games_panel(dialogue: Dialogue, measure: str, title: str, line: float, line_label: str | None) -> Panel:
    honest = [games for games in dialogue.games if not games.noisy]
    groups: dict[str, dict] = {}
    for games in honest:
        groups.setdefault(games.policy, {})[games.decoder] = getattr(games, measure)
    series = list(dict.fromkeys(games.decoder for games in honest))
    words = "; ".join(f"{_name(games)} {with_interval(getattr(games, measure))}" for games in honest)
    draw = partial(draw_dots, groups=groups, series=series, label=title.lower(), line=line, line_label=line_label)
    return Panel(title, f"{title}: {words}.", draw, 0.7 + 0.6 * len(groups), _games_finding(dialogue, measure))


def _games_finding(dialogue: Dialogue, measure: str) -> str:
    before, after = (decimal(getattr(dialogue.of(policy), measure).mean) for policy in (PLAYER, TURNS))
    name, what = {"returns": (RETURN, "the return"), "wasted": (WASTED, "the share of wasted questions")}[measure]
    change = dialogue.differences[name][f"{TURNS} - {PLAYER}"].sign
    words = {1: f"raises {what}", 0: f"does not change {what} beyond noise", -1: f"lowers {what}"}[change]
    return f"DPO on turns {words}: {after} after {before}."


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
            _answers(one.noisy),
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
            ("answers", "share of luck", "returns", "sums of advantages"),
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
        "luck: what answers and guesses add to a return beyond the turns' advantages; margins should follow the latter",
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
