"""The runs of `qstar control` in one table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from qstar_jax.report.numbers import NONE, decimal, signed
from qstar_jax.report.tables import Table, print_table


def print_runs(summaries: Mapping[str, Mapping[str, Any]], console: Console | None = None):
    """Prints the end of each run: rewards, ranking, and how it does in the environment."""
    columns = ("run", "chosen reward", "rejected reward", "expected reward", "ranked right", "gain error", "success")
    rows = tuple((name, *_cells(summary)) for name, summary in summaries.items())
    shown = [n for n in range(len(columns)) if any(row[n] != NONE for row in rows)]
    table = Table(
        "Held-out segments and environment, at the end of each run",
        tuple(columns[n] for n in shown),
        tuple(tuple(row[n] for n in shown) for row in rows),
    )
    print_table(table, console)


def _cells(summary: Mapping[str, Any]) -> tuple[str, ...]:
    rewards = (f"eval_rewards/{name}" for name in ("chosen", "rejected", "reference_expected"))
    success = NONE
    if "eval_success" in summary:
        ends = (summary[f"eval_success_{end}"] for end in ("low", "high"))
        success = f"{decimal(summary['eval_success'], 2)} [{', '.join(decimal(end, 2) for end in ends)}]"
    return (
        *(signed(summary[name], 2) for name in rewards),
        decimal(summary["eval_accuracies"], 2),
        decimal(summary["eval_gain_error"], 3) if "eval_gain_error" in summary else NONE,
        success,
    )
