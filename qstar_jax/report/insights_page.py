"""The insights as one self-contained page: claims, numbers, figures, and responses token by token.

The file loads nothing: figures are part of it, in a light and a dark version.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qstar_jax.console import one_line
from qstar_jax.evaluation.insights.record import Finding, Record
from qstar_jax.evaluation.scored import ScoredResponse, by_row, pair_margin
from qstar_jax.report.insights import VIEWS, View
from qstar_jax.report.page import heatmap_view
from qstar_jax.report.panel import Panel, as_svg, panel_figure
from qstar_jax.report.rendering import render

_PIXELS = 96  # CSS pixels per inch


def insights_page(
    findings: Sequence[Finding],
    records: Sequence[Record] = (),
    *,
    heatmaps: Sequence[ScoredResponse] = (),
    title: str,
    notes: Sequence[str] = (),
) -> str:
    """Draws a section for each insight that has a finding or a record, after the pair that the model tells best apart.

    Returns:
        A whole HTML document that works from a file, offline, and without scripts (then with plain tooltips).

    Raises:
        ValueError: If a finding is of no known insight.
    """
    known = [view.insight for view in VIEWS]
    if unknown := sorted({finding.insight for finding in findings} - set(known)):
        raise ValueError(f"findings of unknown insights: {', '.join(unknown)}; known: {', '.join(known)}")
    sections = []
    for view in VIEWS:
        matching = [finding for finding in findings if finding.insight == view.insight]
        record = next((record for record in records if isinstance(record, view.record)), None)
        sections.append(_section(view, matching, record))
    opening = max(by_row(heatmaps), key=lambda row: pair_margin(row) or -math.inf, default=())
    heat = heatmap_view([*opening, *(response for response in heatmaps if response not in opening)])
    return render(
        "insights.html.j2",
        title=one_line(title),
        notes=notes,
        sections=[section for section in sections if section["findings"] or section["panels"]],
        heat=heat,
        opening=heat["rows"][:1],
        opening_title=_opening_title(opening),
        more=heat["rows"][1:],
    )


def _opening_title(responses: Sequence[ScoredResponse]) -> str:
    """Says what the first responses show: whether their lowest rewards are those of wrong words."""
    marked = [response for response in responses if any(response.wrong)]
    if not marked:
        return "What the model sees in a response"
    if all(response.wrong[response.lowest] for response in marked):
        return "The word with the lowest reward is a wrong one"
    return "The word with the lowest reward is not a wrong one"


def _section(view: View, findings: Sequence[Finding], record: Record | None) -> dict[str, Any]:
    return {
        "id": view.insight,
        "title": one_line(findings[0].title) if len(findings) == 1 else view.heading,
        "findings": list(map(asdict, findings)),
        "panels": [] if record is None else [_panel(panel) for panel in view.panels(record)],
        "tables": [] if record is None else view.tables(record),
        "facts": [] if record is None else [one_line(fact) for fact in view.facts(record)],
    }


def _panel(panel: Panel) -> dict[str, Any]:
    figures = {theme: panel_figure(panel, theme) for theme in ("light", "dark")}
    width, height = figures["light"].get_size_inches()
    return {
        "finding": panel.finding,
        "title": panel.title,
        "alt": panel.alt,
        "width": round(width * _PIXELS),
        "height": round(height * _PIXELS),
        "pictures": {
            theme: "data:image/svg+xml;base64," + base64.b64encode(as_svg(figure)).decode("ascii")
            for theme, figure in figures.items()
        },
    }
