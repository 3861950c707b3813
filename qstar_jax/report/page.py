"""Responses as one self-contained web page, each token on the colour of its reward.

The page loads nothing (a content security policy forbids it), and every text of a model is escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from markupsafe import Markup

from qstar_jax.console import one_line, shorten_middle, visible
from qstar_jax.evaluation.scored import ScoredResponse, by_row, pair_margin
from qstar_jax.report.chart import Bounds, chart_bounds, chart_points, chart_ticks
from qstar_jax.report.colours import DARK, LIGHT, reward_colour, reward_scale, strength
from qstar_jax.report.numbers import signed
from qstar_jax.report.rendering import render

_UNDERLINE_BELOW = -0.5  # strong negatives are underlined too, for greyscale prints and colour-blind readers
_LEGEND_STEPS = 10
_TURN_CHARACTERS = 60


def heatmap_page(responses: Sequence[ScoredResponse], title: str, notes: Sequence[str] = ()) -> str:
    """Draws responses side by side on one colour scale; those of one row stand under their common prompt.

    Returns:
        A whole HTML document that works from a file, offline, and without scripts (then with plain tooltips).
    """
    return render("heatmap.html.j2", title=one_line(title), notes=notes, heat=heatmap_view(responses))


def heatmap_view(responses: Sequence[ScoredResponse]) -> dict[str, Any]:
    """Prepares responses for the macros of `_heatmaps.html.j2`: texts, colours and points, as plain values."""
    scale = reward_scale(reward for response in responses for reward in response.action_rewards)
    turn_scale = reward_scale(turn.reward for response in responses for turn in response.turns)
    step_scale = reward_scale(step.reward for response in responses for step in response.steps)
    rows = by_row(responses)
    margins = [margin for row in rows if (margin := pair_margin(row)) is not None]
    marked = [response for response in responses if any(response.wrong)]
    return {
        "betas": sorted({response.beta for response in responses}),
        "scale": scale,
        "flat": not any(reward for response in responses for reward in response.action_rewards),
        "legend": [_colours(scale * step / _LEGEND_STEPS, scale) for step in range(-_LEGEND_STEPS, _LEGEND_STEPS + 1)],
        "rows": [_row(row, scale, turn_scale, step_scale) for row in rows],
        "environment": not all(all(response.action_mask) for response in responses),
        "pairs": len(margins),
        "agreements": sum(margin > 0 for margin in margins),
        "marked": len(marked),
        "blamed": sum(response.wrong[response.lowest] for response in marked),
    }


def _row(responses: list[ScoredResponse], scale: float, turn_scale: float, step_scale: float) -> dict[str, Any]:
    bounds = chart_bounds([response.running_reward for response in responses])
    margin = pair_margin(responses)
    return {
        "row": responses[0].row,
        "prompt": responses[0].prompt,
        "verdict": None if margin is None else _verdict(margin),
        "responses": [
            _response(response, scale, bounds, margin)
            | {"turns": _turns(response, turn_scale), "steps": _steps(response, scale, step_scale)}
            for response in responses
        ],
        "bounds": bounds,
        "ticks": [("0" if value == 0 else signed(value, 2), bounds.y(value)) for value in chart_ticks(bounds)],
        "truncated": any(response.truncated for response in responses),
    }


def _verdict(margin: float) -> dict[str, Any]:
    winner = "chosen" if margin > 0 else "rejected" if margin < 0 else "neither"
    probability = 0.5 + 0.5 * math.tanh(margin / 2)  # sigmoid that cannot overflow
    return {"winner": winner, "margin": signed(margin), "probability": f"{probability:.3f}"}


def _response(response: ScoredResponse, scale: float, bounds: Bounds, margin: float | None) -> dict[str, Any]:
    text = "".join(response.pieces)
    preferred = margin is not None and margin != 0 and response.role == ("chosen" if margin > 0 else "rejected")
    return {
        "role": response.role,
        "total": signed(response.total_reward),
        "actions": sum(response.action_mask),
        "truncated": response.truncated,
        "preferred": preferred,
        "is_code": "```" in text or "\n    " in text or "\n\t" in text,  # indentation needs a monospaced font
        "tokens": [_token(response, index, scale) for index in range(len(response.pieces))],
        "lowest": _lowest(response),
        "points": chart_points(response.running_reward, bounds),
    }


def _lowest(response: ScoredResponse) -> str:
    """Says whether the lowest reward is that of a wrong word; empty where the data mark nothing."""
    if not any(response.wrong):
        return ""
    verdict = "which is wrong" if response.wrong[response.lowest] else "which is not among the wrong words"
    return f"The lowest reward is that of {_quoted(response.pieces[response.lowest].strip())}, {verdict}."


def _turns(response: ScoredResponse, scale: float) -> list[dict[str, Any]]:
    """One row per turn; none for a single turn, of which the heading says all."""
    turns = response.turns
    if len(turns) < 2:
        return []
    return [
        {
            "turn": turn.turn,
            "text": one_line(shorten_middle(turn.text.strip(), _TURN_CHARACTERS)),
            "actions": turn.actions,
            "reward": signed(turn.reward),
            "value": signed(turn.value),
            "colours": _colours(turn.reward, scale),
        }
        for turn in turns
    ]


def _steps(response: ScoredResponse, scale: float, step_scale: float) -> dict[str, Any] | None:
    """One line per step, and one for what the environment says between steps; None where steps were not asked for."""
    if not response.step:
        return None
    steps, lines = {step.step: step for step in response.steps}, []
    for number, places in groupby(range(len(response.step)), key=response.step.__getitem__):
        line = {"tokens": [_token(response, place, scale) for place in places], "step": None}
        if number in steps:
            step = steps[number]
            line |= {
                "step": number,
                "reward": signed(step.reward),
                "value": signed(step.value),
                "colours": _colours(step.reward, step_scale),
                "suspected": number == response.first_error,
            }
        lines.append(line)
    totals = {name: signed(value) for name, value in asdict(response.step_totals).items()}
    return {"lines": lines, "totals": totals}


def _token(response: ScoredResponse, index: int, scale: float) -> dict[str, Any]:
    piece, reward = response.pieces[index], response.reward[index]
    token = {
        "token": _quoted(piece) if piece else "(part of the next character)",
        "id": response.token_ids[index],
    }
    if len(set(response.turn)) > 1 and response.action_mask[index]:
        token["turn"] = response.turn[index]
    if is_wrong := any(response.wrong[index : index + 1]):
        token["in the data"] = "marked as wrong"
    text = Markup('<i class="mark">↵</i>\n').join(visible(piece).split("\n"))
    if not response.action_mask[index]:
        facts = _lines(token | {"no action": "written by the environment, or not learned"})
        return {"text": text, "facts": facts, "low": False, "wrong": False, "colours": ""}
    facts = token | {
        "log π": signed(response.logp[index]),
        "log π_ref": signed(response.ref_logp[index]),
        "reward": signed(reward),
        "Q": signed(response.q[index]),
        "V": signed(response.v[index]),
        "reward so far": signed(response.running_reward[index]),
    }
    if response.endogenous and (endogenous := response.endogenous[index]) is not None:
        facts["endogenous reward"] = signed(endogenous)
    if response.entropy:
        facts["entropy of π_ref"] = signed(response.entropy[index])
    return {
        "text": text,
        "facts": "\n".join([_lines(facts), *_others(response, index)]),
        "low": strength(reward, scale) < _UNDERLINE_BELOW,
        "wrong": is_wrong,
        "colours": _colours(reward, scale),
    }


def _lines(facts: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _others(response: ScoredResponse, index: int) -> list[str]:
    """Rows of a table; cells are separated by tabs, which `one_line` removes from texts."""
    places = response.alternatives[index] if response.alternatives else ()
    rows = [f"{_quoted(other.piece)}\t{signed(other.logp)}\t{signed(other.reward)}" for other in places]
    return ["most likely here\tlog π\treward", *rows] if rows else []


def _quoted(piece: str) -> str:
    return f"“{one_line(piece)}”"


def _colours(reward: float, scale: float) -> str:
    return f"--l:{reward_colour(reward, scale, LIGHT)};--d:{reward_colour(reward, scale, DARK)}"
