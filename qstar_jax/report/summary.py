"""One page of what was measured: report.html, summary.json and the figures."""

import json
from pathlib import Path

from rich.console import Console

from qstar_jax.config import ReportConfig
from qstar_jax.console import say
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.findings import findings
from qstar_jax.evaluation.scored import ScoredResponse, by_row, read_scores
from qstar_jax.report.figures import write_figures
from qstar_jax.report.insights_page import insights_page
from qstar_jax.report.insights_terminal import print_findings
from qstar_jax.store.files import write_json
from qstar_jax.store.identity import file_digest


def write_report(config: ReportConfig, console: Console, **more) -> dict:
    """Writes report.html, summary.json and the figures as PNG, and says in the terminal what they show.

    Args:
        config: Where the measurements lie.
        console: Where to say it.
        **more: Further entries of summary.json.

    Returns:
        What summary.json holds.

    Raises:
        InputError: If nothing is named, or a folder does not hold what it should.
    """
    records = {
        name: _read(Path(folder) / f"{name}.json", name)
        for name in ("credit", "sweep", "decline")
        if (folder := getattr(config, name)) is not None
    }
    if not records:
        raise InputError("name what shall be shown with --credit, --sweep or --decline, or several of them")
    shown = _heatmaps(Path(config.credit), records["credit"], config.show) if config.credit else []
    said, out = findings(**records), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    page = insights_page(said, **records, heatmaps=shown, title=config.title)
    (out / "report.html").write_text(page, encoding="utf-8")
    write_figures(out, **records)
    summary = {"verdicts": said, **records, **more}
    write_json(out / "summary.json", summary)
    print_findings(said, console)
    say(console, f"report.html, summary.json, figures: {out}")
    return summary


def _read(path: Path, name: str) -> dict:
    verb = {"credit": "score --wrong COLUMN"}.get(name, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; --{name} expects a folder that `qstar {verb}` wrote") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run `qstar {verb}` again") from error


def _heatmaps(folder: Path, credit: dict, rows: int) -> list[ScoredResponse]:
    """The first rows that were scored: those whose credit was measured, and no others."""
    path = folder / "scores.jsonl"
    if not path.is_file() or credit.get("scores") != file_digest(path):
        found = "other scores" if path.is_file() else "nothing there"
        raise InputError(
            f"{folder / 'credit.json'} was not measured on {path} beside it (found: {found}); run "
            "`qstar score --wrong COLUMN` into that folder again"
        )
    return [record for row in by_row(read_scores(path))[:rows] for record in row]
