"""`qstar pairs`."""

import json
from pathlib import Path

from rich.console import Console

from qstar_jax.config import PairsConfig
from qstar_jax.config.paths import recorded
from qstar_jax.console import one_line, say
from qstar_jax.errors import InputError
from qstar_jax.evaluation.pairs import Pairs, below, marked_wrong, response_pairs, step_pairs, worst
from qstar_jax.evaluation.samples import read_samples
from qstar_jax.report.tables import Table, print_table
from qstar_jax.store.files import write_atomically, write_json

PAIRS, SUMMARY = "pairs.jsonl", "pairs.json"


def run(config: PairsConfig):
    """Makes pairs of samples, and says what became of each sample."""
    console = Console()
    samples, dropped = read_samples(config)
    if config.steps:
        marked = config.wrong_step is not None
        rule = marked_wrong if marked else worst if config.threshold is None else below(config.threshold)
        pairs = step_pairs(samples, rule, margin=config.margin)
    else:
        pairs = response_pairs(samples, margin=config.margin)
    print_table(pairs_table(pairs, "samples" if config.steps else "prompts", dropped), console)
    if not pairs.rows:
        raise InputError(f"{config.samples}: no pair can be made of its {len(samples):,} samples (see above)")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs.rows)
    write_atomically(out / PAIRS, lines.encode())
    counts = {"samples": len(samples), "pairs": len(pairs.rows), "unused": pairs.unused, "dropped": dropped}
    write_json(out / SUMMARY, counts | {"options": recorded(config)})
    say(console, f"pairs: {out / PAIRS}; train on them with qstar dpo --data.train {out / PAIRS}")


def pairs_table(pairs: Pairs, unit: str, dropped: dict[str, int]) -> Table:
    """Lays out how many pairs there are, and why there are not more."""
    rows = [("pairs", f"{len(pairs.rows):,}")]
    prefix = "" if unit == "prompts" else "samples: "
    rows += [(f"{prefix}{reason}", f"{count:,}") for reason, count in pairs.unused.most_common()]
    rows += [(f"dropped: {one_line(reason)}", f"{count:,}") for reason, count in dropped.items()]
    return Table("what became of the samples", ("", "count"), tuple(rows))
