"""The running sum of rewards as the points of an SVG line; the responses of a row share one frame."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 1000, 100
_TICK_GAP = 25  # labels closer to each other than this would touch


@dataclass(frozen=True)
class Bounds:
    """The frame of a chart.

    Args:
        length: Tokens of the longest response.
        low: Lowest running sum, at most 0.
        high: Highest running sum, at least 0.
    """

    length: int
    low: float
    high: float

    def y(self, value: float) -> float:
        """Returns the distance of a running sum (nats) from the upper edge, in units of the picture."""
        return round(HEIGHT * (self.high - value) / ((self.high - self.low) or 1.0), 2)


def chart_bounds(series: Sequence[Sequence[float]]) -> Bounds:
    """Finds the frame that holds zero and every line of a row; values that are not finite are skipped."""
    values = [value for line in series for value in line if math.isfinite(value)]
    return Bounds(max(map(len, series), default=0), min([0.0, *values]), max([0.0, *values]))


def chart_points(line: Sequence[float], bounds: Bounds) -> str:
    """Draws a line from zero, before the first token, through the sum after each token, as points of an SVG polyline.

    It ends before the first sum that is not finite.
    """
    points = [(0.0, bounds.y(0.0))]
    for index, value in enumerate(line, start=1):
        if not math.isfinite(value):
            break
        points.append((round(WIDTH * index / bounds.length, 1), bounds.y(value)))
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def chart_ticks(bounds: Bounds) -> list[float]:
    """Chooses the running sums to label: zero, and each edge of the frame that is far enough from it."""
    return [0.0, *(edge for edge in (bounds.low, bounds.high) if abs(bounds.y(edge) - bounds.y(0.0)) >= _TICK_GAP)]
