"""One page of everything that was measured: report.html, summary.json and the figures."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from qstar_jax.config import ReportConfig
from qstar_jax.console import one_line, say, visible
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.credit import Credit
from qstar_jax.evaluation.insights.record import Finding
from qstar_jax.evaluation.score import SCORES
from qstar_jax.evaluation.scored import ScoredResponse, by_row, read_scores
from qstar_jax.report.insights import VIEWS, write_figure
from qstar_jax.report.insights_page import insights_page
from qstar_jax.store.files import write_json
from qstar_jax.store.identity import file_digest

_STATES = {True: ("reproduced", "green"), False: ("not reproduced", "red"), None: ("cannot be told", "yellow")}


def write_report(config: ReportConfig, console: Console, **more: Any) -> dict[str, Any]:
    """Writes report.html, summary.json and the figures as PNG, and prints the findings.

    Raises:
        InputError: If no folder is named, or one does not hold what it should.
    """
    folders = {view.record: getattr(config, view.record.NAME) for view in VIEWS}
    records = [kind.read(Path(folder)) for kind, folder in folders.items() if folder is not None]
    if not records:
        names = [f"--{kind.NAME}" for kind in folders]
        raise InputError(f"name a folder to show with {', '.join(names[:-1])} or {names[-1]}, or several of them")
    heatmaps = [row for r in records if isinstance(r, Credit) for row in _heatmaps(Path(config.credit), r, config.show)]
    findings, out = [record.finding() for record in records], Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    page = insights_page(findings, records, heatmaps=heatmaps, title=config.title)
    (out / "report.html").write_text(page, encoding="utf-8")
    for record in records:
        write_figure(record, out)
    summary = {"verdicts": list(map(asdict, findings)), **{r.NAME: r.to_json() for r in records}, **more}
    write_json(out / "summary.json", summary)
    print_findings(findings, console)
    say(console, f"report.html, summary.json, figures: {out}")
    return summary


def _heatmaps(folder: Path, credit: Credit, rows: int) -> list[ScoredResponse]:
    """The first rows of the scores on which credit was measured, and of no others."""
    path = folder / SCORES
    if not path.is_file() or credit.scores != file_digest(path):
        state = "other scores" if path.is_file() else "nothing there"
        raise InputError(
            f"{folder / 'credit.json'} was not measured on {path} beside it (found: {state}); run "
            f"`{Credit.COMMAND}` into that folder again"
        )
    return [response for responses in by_row(read_scores(path))[:rows] for response in responses]


def print_findings(findings: Sequence[Finding], console: Console | None = None):
    """Prints each finding beside the paper's statement."""
    console = console or Console()
    for number, finding in enumerate(findings, start=1):
        word, colour = _STATES[finding.reproduced]
        heading = Text(f"{number}. {one_line(finding.title)}: ", style="bold").append(word, f"bold {colour}")
        console.print(heading)
        grid = Grid.grid(padding=(0, 2, 0, 0))
        lines = {"claim": finding.claim, "measured": finding.measured, "paper": finding.paper}
        for label, text in (lines | {"made by": finding.command}).items():
            if text:
                grid.add_row(Text(label, style="dim"), Text(visible(text), overflow="fold"))
        console.print(grid)
        console.print()
