"""The first responses of a scored file, token by token, on a terminal and on a page."""

from pathlib import Path

from rich.console import Console

from qstar_jax.console import say
from qstar_jax.evaluation.score import ScoredFile
from qstar_jax.report.page import heatmap_page
from qstar_jax.report.terminal import print_heatmaps


def show_scores(scored: ScoredFile, console: Console):
    """Prints the responses of the first `config.show` rows token by token, and writes heatmap.html."""
    written = [scored.path]
    shown_rows = list(dict.fromkeys(response.row for response in scored.responses))[: scored.config.show]
    shown = [response for response in scored.responses if response.row in shown_rows]
    if shown:
        print_heatmaps(shown, console)
        title = f"Token rewards: {Path(scored.config.model).name}"
        written.append(scored.out / "heatmap.html")
        written[-1].write_text(heatmap_page(shown, title), encoding="utf-8")
    say(console, f"{len(scored.responses)} responses scored: {', '.join(map(str, written))}")
