"""`qstar report`."""

from rich.console import Console

from qstar_jax.config import ReportConfig
from qstar_jax.report.summary import write_report


def run(config: ReportConfig):
    """Writes one page of what the other verbs have measured."""
    write_report(config, Console())
