"""The three insights as one self-contained page: claims, numbers, figures, and answers token by token.

Nothing is loaded from anywhere: figures are part of the file, in a light and a dark version.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from qstar_jax.console import one_line, visible
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.report.figures import PANELS, Panel, as_svg, panel_figure
from qstar_jax.report.page import heatmap_view
from qstar_jax.report.rendering import render
from qstar_jax.report.tables import TABLES

Record = Mapping[str, Any]

# Insight -> (name of its record, heading where no finding gives one)
_INSIGHTS = {
    "credit": ("credit", "Credit: which tokens earn the reward"),
    "search": ("sweep", "Search: likely answers and good ones"),
    "decline": ("decline", "Decline: rewards of chosen answers in training"),
}
_PIXELS = 96  # of CSS, an inch


def insights_page(
    findings: Sequence[Record],
    *,
    credit: Record | None = None,
    sweep: Record | None = None,
    decline: Record | None = None,
    heatmaps: Sequence[ScoredResponse] = (),
    title: str,
    notes: Sequence[str] = (),
) -> str:
    """Draws what is there of the three insights.

    Args:
        findings: What was found: `insight`, `title`, `claim`, `paper`, `measured`, `reproduced` (None: cannot be told)
            and `command`.
        credit: See `figures.credit.credit_panels`.
        sweep: See `figures.sweep.sweep_panels`.
        decline: See `figures.decline.decline_panels`.
        heatmaps: Answers to show token by token.
        title: Heading of the page.
        notes: Paragraphs under it.

    Returns:
        A whole HTML document that works from a file, offline, and without scripts (then with plain tooltips).

    Raises:
        ValueError: If a finding is of no known insight.
    """
    unknown = sorted({finding["insight"] for finding in findings} - set(_INSIGHTS))
    if unknown:
        raise ValueError(f"findings of unknown insights: {', '.join(unknown)}; known: {', '.join(_INSIGHTS)}")
    records = {"credit": credit, "sweep": sweep, "decline": decline}
    sections = [
        _section(number, insight, [f for f in findings if f["insight"] == insight], records[_INSIGHTS[insight][0]])
        for number, insight in enumerate(_INSIGHTS, start=1)
    ]
    return render(
        "insights.html.j2",
        title=one_line(title),
        notes=[visible(note) for note in notes],
        sections=[section for section in sections if section["findings"] or section["panels"]],
        heat=heatmap_view(heatmaps) if heatmaps else None,
    )


def _section(number: int, insight: str, findings: Sequence[Record], record: Record | None) -> dict[str, Any]:
    kind, heading = _INSIGHTS[insight]
    texts = ("title", "claim", "paper", "measured", "command")
    return {
        "id": insight,
        "number": number,
        "title": one_line(findings[0]["title"]) if len(findings) == 1 else heading,
        "findings": [
            {name: visible(finding[name]) for name in texts} | {"reproduced": finding["reproduced"]}
            for finding in findings
        ],
        "panels": [] if record is None else [_panel(panel) for panel in PANELS[kind](record)],
        "tables": [] if record is None else TABLES[kind](record),
        "facts": [] if record is None else [one_line(fact) for fact in _FACTS[kind](record)],
    }


def _panel(panel: Panel) -> dict[str, Any]:
    figures = {theme: panel_figure(panel, theme) for theme in ("light", "dark")}
    width, height = figures["light"].get_size_inches()
    return {
        "title": panel.title,
        "alt": panel.alt,
        "width": round(width * _PIXELS),
        "height": round(height * _PIXELS),
        "pictures": {
            theme: "data:image/svg+xml;base64," + base64.b64encode(as_svg(figure)).decode("ascii")
            for theme, figure in figures.items()
        },
    }


def _credit_facts(credit: Record) -> list[str]:
    return [
        f"policy {credit['model']}; reference {credit['reference']}; beta {credit['beta']:g}",
        f"{credit['answers']:,} answers, {credit['tokens']:,} tokens, {credit['wrong_tokens']:,} of them wrong",
        "bars: 95 % bootstrap intervals over answers",
    ]


def _sweep_facts(sweep: Record) -> list[str]:
    seeds = ", ".join(map(str, sweep["seeds"]))
    undecided = sum(point.get("undecided", 0) for run in sweep["runs"] for point in run["points"])
    return [
        f"judge: {sweep['judge']}; {sweep['prompts']:,} prompts; seeds {seeds}",
        *(f"{run['name']}: {run['model']}" for run in sweep["runs"]),
        *([f"{undecided:,} answers on which the judge did not decide are left out of win rates"] if undecided else []),
        "bars: 95 % intervals; hollow marks: width 1, sampled and greedy",
    ]


def _decline_facts(decline: Record) -> list[str]:
    return [
        *(
            f"{run['name']} ({run['folder']}, beta {run['beta']:g}): {run['verdict'] or 'no verdict'}"
            for run in decline["runs"]
        ),
        "bands: two standard errors",
    ]


_FACTS = {"credit": _credit_facts, "sweep": _sweep_facts, "decline": _decline_facts}
