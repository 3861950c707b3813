"""`qstar score`."""

from dataclasses import replace

from rich.console import Console

from qstar_jax.config import ScoreConfig
from qstar_jax.evaluation.insights.credit import measure_credit
from qstar_jax.evaluation.score import score_file
from qstar_jax.report.insights import show
from qstar_jax.report.scores import show_scores
from qstar_jax.store.identity import file_digest


def run(config: ScoreConfig):
    """Scores every response of a file, and measures credit and first errors where the file says what is wrong."""
    console = Console()
    scored, credit = score_file(config, console), None
    if config.wrong:
        credit, scored = measure_credit(scored)
    show_scores(scored, console)
    if credit:
        show(credit, scored.out, console)
    if scored.step_errors:
        errors = replace(scored.step_errors, scores=file_digest(scored.path))
        errors.write(scored.out)
        show(errors, scored.out, console)
