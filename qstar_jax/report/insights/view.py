"""What a record of an insight offers to those that show it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from qstar_jax.evaluation.insights.record import Record
from qstar_jax.report.panel import Panel
from qstar_jax.report.tables import Table


@dataclass(frozen=True)
class View:
    """The views of one kind of record.

    Attributes:
        record: The kind of record, which the functions below take.
        insight: Name of the insight in its findings, and of its section on the page.
        heading: Heading of the section, where its findings give none.
        panels: The figure, as panels.
        tables: The numbers behind the figure.
        facts: What else a reader must know, in short lines.
        print: Prints the numbers on a terminal; nothing depends on colour.
    """

    record: type[Record]
    insight: str
    heading: str
    panels: Callable[[Any], list[Panel]]
    tables: Callable[[Any], list[Table]]
    facts: Callable[[Any], list[str]]
    print: Callable[[Any, Console], None]
