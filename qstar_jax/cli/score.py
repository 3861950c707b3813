"""`qstar score`."""

from rich.console import Console

from qstar_jax.config import ScoreConfig
from qstar_jax.evaluation.insights.credit import measure_credit
from qstar_jax.evaluation.score import score_file
from qstar_jax.report.insights import show
from qstar_jax.report.scores import show_scores


def run(config: ScoreConfig):
    """Scores every response of a file, and measures credit where the file marks what is wrong."""
    console = Console()
    scored, credit = score_file(config, console), None
    if config.wrong:
        credit, scored = measure_credit(scored)
    show_scores(scored, console)
    if credit:
        show(credit, scored.out, console)
