"""What `qstar score` shows: the first responses token by token, and credit."""

from pathlib import Path
from typing import Any

from rich.console import Console

from qstar_jax.console import say
from qstar_jax.evaluation.score import ScoredFile
from qstar_jax.report.figures import write_figures
from qstar_jax.report.insights_terminal import print_credit
from qstar_jax.report.page import heatmap_page
from qstar_jax.report.terminal import print_heatmaps


def show_scores(scored: ScoredFile, console: Console):
    """Prints the first responses token by token, and writes heatmap.html.

    Args:
        scored: What was scored; its `config.show` says how many rows to show.
        console: Where to print.
    """
    written = [scored.path]
    shown_rows = list(dict.fromkeys(response.row for response in scored.responses))[: scored.config.show]
    shown = [response for response in scored.responses if response.row in shown_rows]
    if shown:
        print_heatmaps(shown, console)
        title = f"Token rewards: {Path(scored.config.model).name}"
        written.append(scored.out / "heatmap.html")
        written[-1].write_text(heatmap_page(shown, title), encoding="utf-8")
    say(console, f"{len(scored.responses)} answers scored: {', '.join(map(str, written))}")


def show_credit(credit: dict[str, Any], out: Path, console: Console):
    """Prints what was measured of credit, and draws credit.png.

    Args:
        credit: What credit.json holds.
        out: Folder of credit.json.
        console: Where to print.
    """
    print_credit(credit, console)
    files = [out / "credit.json", *write_figures(out, credit=credit)]
    say(console, f"credit: {', '.join(map(str, files))}")
