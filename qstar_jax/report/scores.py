"""The first responses of a scored file, token by token, on a terminal and on a page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from qstar_jax.console import say
from qstar_jax.evaluation.intervals import mean_interval
from qstar_jax.evaluation.score import ScoredFile
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.report.numbers import NONE
from qstar_jax.report.page import heatmap_page
from qstar_jax.report.tables import Table, cell, print_table
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
    print_table(turns_table(scored.responses), console)
    say(console, f"{len(scored.responses)} responses scored: {', '.join(map(str, written))}")


def turns_table(responses: Sequence[ScoredResponse]) -> Table:
    """Lists the mean reward of each turn, by role: where in dialogues rewards rise or decline.

    Empty if every response is a single turn.
    """
    rewards: dict[int, dict[str, list[float]]] = {}
    for response in responses:
        for turn in response.turns:
            rewards.setdefault(turn.turn, {}).setdefault(response.role, []).append(turn.reward)
    roles = tuple(dict.fromkeys(response.role for response in responses))

    def mean(values: list[float]) -> str:
        return f"{cell(mean_interval(np.array(values)), 3, lone=len(values) < 2)} ({len(values)})" if values else NONE

    rows = [(str(turn), *(mean(rewards[turn].get(role, [])) for role in roles)) for turn in sorted(rewards)]
    return Table("mean reward of each turn (of how many)", ("turn", *roles), tuple(rows) if len(rows) > 1 else ())
