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
    scored = score_file(config, console)
    show_scores(scored, console)
    if config.wrong:
        show(measure_credit(scored), scored.out, console)
