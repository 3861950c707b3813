"""Responses as one self-contained web page, each token on the colour of its reward.

Nothing is loaded from anywhere (a content security policy forbids it), and every text of a model is escaped.
"""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from qstar_jax.console import one_line, visible
from qstar_jax.evaluation.scored import ScoredResponse, by_row, pair_margin
from qstar_jax.report.chart import Bounds, chart_bounds, chart_points, chart_ticks
from qstar_jax.report.colours import DARK, LIGHT, reward_colour, reward_scale, strength
from qstar_jax.report.numbers import signed
from qstar_jax.report.rendering import render

_UNDERLINE_BELOW = -0.5  # strong negatives carry a second sign, for greyscale prints and colour-blind eyes
_LEGEND_STEPS = 10


def heatmap_page(responses: Sequence[ScoredResponse], title: str, notes: Sequence[str] = ()) -> str:
    """Draws responses side by side on one colour scale.

    Args:
        responses: Responses to show; those of one row stand under their common prompt.
        title: Heading of the page.
        notes: Paragraphs under it.

    Returns:
        A whole HTML document that works from a file, offline, and without scripts (then with plain tooltips).
    """
    return render("heatmap.html.j2", title=one_line(title), notes=notes, heat=heatmap_view(responses))


def heatmap_view(responses: Sequence[ScoredResponse]) -> dict[str, Any]:
    """Prepares responses for the macros of `_heatmaps.html.j2`.

    Args:
        responses: Responses to show on one colour scale.

    Returns:
        Texts, colours and points of lines.
    """
    scale = reward_scale(reward for response in responses for reward in response.reward)
    rows = by_row(responses)
    margins = [margin for row in rows if (margin := pair_margin(row)) is not None]
    return {
        "betas": sorted({response.beta for response in responses}),
        "scale": scale,
        "legend": [_colours(scale * step / _LEGEND_STEPS, scale) for step in range(-_LEGEND_STEPS, _LEGEND_STEPS + 1)],
        "rows": [_row(row, scale) for row in rows],
        "pairs": len(margins),
        "agreements": sum(margin > 0 for margin in margins),
    }


def _row(answers: list[ScoredResponse], scale: float) -> dict[str, Any]:
    bounds = chart_bounds([answer.running_reward for answer in answers])
    margin = pair_margin(answers)
    return {
        "row": answers[0].row,
        "prompt": visible(answers[0].prompt),
        "verdict": None if margin is None else _verdict(margin),
        "answers": [_answer(answer, scale, bounds, margin) for answer in answers],
        "bounds": bounds,
        "ticks": [("0" if value == 0 else signed(value, 2), bounds.y(value)) for value in chart_ticks(bounds)],
        "truncated": any(answer.truncated for answer in answers),
    }


def _verdict(margin: float) -> dict[str, Any]:
    winner = "chosen" if margin > 0 else "rejected" if margin < 0 else "neither"
    probability = 0.5 + 0.5 * math.tanh(margin / 2)  # sigmoid that cannot overflow
    return {"winner": winner, "margin": signed(margin), "probability": f"{probability:.3f}"}


def _answer(answer: ScoredResponse, scale: float, bounds: Bounds, margin: float | None) -> dict[str, Any]:
    text = "".join(answer.pieces)
    preferred = margin is not None and margin != 0 and answer.role == ("chosen" if margin > 0 else "rejected")
    return {
        "role": answer.role,
        "total": signed(answer.total_reward),
        "truncated": answer.truncated,
        "preferred": preferred,
        "is_code": "```" in text or "\n    " in text or "\n\t" in text,  # indentation needs letters of equal width
        "tokens": [_token(answer, index, scale) for index in range(len(answer.pieces))],
        "points": chart_points(answer.running_reward, bounds),
    }


def _token(answer: ScoredResponse, index: int, scale: float) -> dict[str, Any]:
    piece, reward = answer.pieces[index], answer.reward[index]
    facts = {
        "token": _quoted(piece) if piece else "(part of the next character)",
        "id": answer.token_ids[index],
        "log π": signed(answer.logp[index]),
        "log π_ref": signed(answer.ref_logp[index]),
        "reward": signed(reward),
        "Q": signed(answer.q[index]),
        "V": signed(answer.v[index]),
        "reward so far": signed(answer.running_reward[index]),
    }
    lines = [f"{name}: {value}" for name, value in facts.items()]
    return {
        "text": Markup('<i class="mark">↵</i>\n').join(visible(piece).split("\n")),
        "facts": "\n".join(lines + _others(answer, index)),
        "low": strength(reward, scale) < _UNDERLINE_BELOW,
        "colours": _colours(reward, scale),
    }


def _others(answer: ScoredResponse, index: int) -> list[str]:
    """Rows of a table, cells between tabs, which `one_line` leaves in no text."""
    places = answer.alternatives[index] if answer.alternatives else ()
    rows = [f"{_quoted(other.piece)}\t{signed(other.logp)}\t{signed(other.reward)}" for other in places]
    return ["likeliest here\tlog π\treward", *rows] if rows else []


def _quoted(piece: str) -> str:
    return f"“{one_line(piece)}”"


def _colours(reward: float, scale: float) -> str:
    return f"--l:{reward_colour(reward, scale, LIGHT)};--d:{reward_colour(reward, scale, DARK)}"
