"""The numbers behind the figures as tables of text, for the page and for the terminal."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qstar_jax.console import one_line
from qstar_jax.report.figures.decline import CURVES, numbers
from qstar_jax.report.figures.sweep import MEASURES, difference_name, point_name
from qstar_jax.report.numbers import NONE, Interval, decimal, signed, with_interval


@dataclass(frozen=True)
class Table:
    """A table of text that is safe to look at.

    Args:
        caption: What it shows.
        columns: Headings; the first column names the rows.
        rows: Cells, as many as there are headings.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def credit_tables(credit: Mapping[str, Any], *, brief: bool = False) -> list[Table]:
    """AUC of each detector by kind of error, and what the implicit reward gains.

    Args:
        credit: See `figures.credit_panels`.
        brief: Leave out the intervals of all detectors but the first, for narrow terminals.

    Returns:
        One or two tables.
    """
    kinds = {"all errors": credit} | credit["kinds"]
    names = list(dict.fromkeys(name for kind in kinds.values() for name in kind["detectors"]))
    rows = [
        (
            one_line(kind),
            str(found["answers"]),
            *(_number(found["detectors"].get(name), 3, brief and name != names[0]) for name in names),
        )
        for kind, found in kinds.items()
    ]
    caption = f"AUC of finding {credit['wrong_tokens']:,} wrong tokens of {credit['tokens']:,}, with 95 % intervals"
    tables = [Table(caption, ("errors", "answers", *map(one_line, names)), tuple(rows))]
    if credit.get("differences"):
        gains = tuple((one_line(name), with_interval(value, 3)) for name, value in credit["differences"].items())
        tables.append(Table("AUC of the implicit reward minus that of", ("detector", "gain"), gains))
    return tables


def sweep_tables(sweep: Mapping[str, Any], *, brief: bool = False) -> list[Table]:
    """Every measure of each decoder, one table a run, and the differences of win rates.

    Args:
        sweep: See `figures.sweep_panels`.
        brief: Leave out the intervals of all measures but the win rate, and list differences in one column, for narrow
            terminals.

    Returns:
        The tables.
    """
    runs, tables = sweep["runs"], []
    shown = [name for name in MEASURES if any(point.get(name) for run in runs for point in run["points"])]
    heads = {name: name.replace("_", " ").replace("logp", "log π") for name in shown}
    for run in runs:
        rows = []
        for point in run["points"]:
            cells = [_number(point.get(name), MEASURES[name][2], brief and name != "win_rate") for name in shown]
            rows.append((_decoder(point), *cells, f"{point['truncated']:.1%}"))
        tables.append(Table(one_line(run["name"]), ("decoder", *heads.values(), "cut"), tuple(rows)))
    return tables + _difference_tables(runs, brief)


def _difference_tables(runs: Sequence[Mapping[str, Any]], brief: bool) -> list[Table]:
    found = {
        (difference_name(what), one_line(run["name"])): with_interval(interval)
        for run in runs
        for what, interval in run.get("differences", {}).items()
    }
    if not found:
        return []
    whats, names = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    if brief:
        rows = tuple((what, name, found[what, name]) for what in whats for name in names if (what, name) in found)
        columns = ("win rates", "run", "difference")
    else:
        rows = tuple((what, *(found.get((what, name), NONE) for name in names)) for what in whats)
        columns = ("win rates", *names)
    return [Table("Differences of win rates, with 95 % intervals", columns, rows)]


def decline_tables(decline: Mapping[str, Any], *, most: int = 12) -> list[Table]:
    """Rewards at steps that are spread over the training, one table a run.

    Args:
        decline: See `figures.decline_panels`.
        most: Steps of a table at most, the first and the last among them.

    Returns:
        One table a run.
    """
    return [
        Table(
            f"{one_line(run['name'])}: implicit reward ± standard error, "
            f"{'held-out' if run['held_out'] else 'training'} pairs",
            ("step", *(name for name in CURVES if name in run["curves"])),
            tuple((str(run["steps"][at]), *_rewards(run, at)) for at in _spread(len(run["steps"]), most)),
        )
        for run in decline["runs"]
    ]


def _rewards(run: Mapping[str, Any], at: int) -> Iterator[str]:
    for name in CURVES:
        if name in run["curves"]:
            value = numbers(run["curves"][name])[at]
            errors = numbers((run.get("stderr") or {}).get(name, ()))
            error = f" ± {errors[at]:.2f}" if errors and math.isfinite(errors[at]) else ""
            yield f"{signed(value, 2)}{error}" if math.isfinite(value) else NONE


def _spread(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(n * (count - 1) / (most - 1)) for n in range(most)})


def _decoder(point: Mapping[str, Any]) -> str:
    name = point_name(point)
    return f"{name} beams" if name.isdigit() else name


def _number(interval: Interval | None, digits: int, lone: bool) -> str:
    return decimal(interval["mean"], digits) if lone and interval else with_interval(interval, digits)


TABLES: Mapping[str, Callable[[Mapping[str, Any]], list[Table]]] = {
    "credit": credit_tables,
    "sweep": sweep_tables,
    "decline": decline_tables,
}
