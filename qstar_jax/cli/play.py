"""`qstar play`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from qstar_jax.config import PlayConfig
from qstar_jax.console import one_line, say
from qstar_jax.evaluation.intervals import mean_interval
from qstar_jax.evaluation.play import GAMES, PAIRS, pairs_of, play, returns_by_seed
from qstar_jax.report.tables import Table, print_table


def run(config: PlayConfig):
    """Plays games, and says how they went."""
    console = Console()
    rows = play(config, console)
    print_table(games_table(config.game, rows), console)
    for count, text in _stopped(rows):
        say(console, f"{count} {text}")
    say(console, f"games: {Path(config.out) / GAMES}")
    if config.repeats > 1:
        say(console, f"pairs: {len(pairs_of(rows)):,} games with different returns, {Path(config.out) / PAIRS}")


def games_table(game: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Lays out returns with their interval over seeds, and how games ended."""
    reasons = Counter(row["reason"].partition(".")[0] for row in rows if row["reward"] is not None)
    labelled = [row["label"] for row in rows if row["label"] is not None]
    returns = returns_by_seed(rows)
    cells = [
        ("return", f"{mean_interval(returns):.3f}" if np.isfinite(returns).any() else "-"),
        ("won", f"{np.mean(labelled):.0%}" if labelled else "-"),
        ("turns", f"{np.mean([row['turns'] for row in rows]):.1f}"),
        *((one_line(reason), f"{count:,}") for reason, count in reasons.most_common(3)),
    ]
    return Table(f"{game}, {len(rows):,} games", ("", "mean"), tuple(cells))


def _stopped(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """What a user should know of rows that are not as they should be."""
    notes = (
        (
            sum(row["reward"] is None for row in rows),
            "games were stopped and have no return (training drops them): raise --max_turns or --max_length",
        ),
        (
            sum(row["truncated_turns"] for row in rows),
            "turns reached --decode.max_new_tokens before they ended, and are learned as if they had ended",
        ),
    )
    return [(count, text) for count, text in notes if count]
