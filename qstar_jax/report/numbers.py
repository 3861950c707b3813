"""Numbers as readers see them: with a minus that is as wide as the plus, and ends of their intervals."""

from qstar_jax.evaluation.intervals import Interval

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"  # what was not measured


def decimal(value: float, digits: int = 2) -> str:
    """Writes a number without a plus, such as "0.04"."""
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """Writes a number with its sign, such as "+0.043"."""
    return f"{value + 0.0:+.{digits}f}".replace("-", MINUS)  # the sum makes -0.0 a plain zero


def with_interval(interval: Interval | None, digits: int = 2) -> str:
    """Writes a mean and the ends of its interval, such as "0.61 [0.55, 0.67]"; a dash for None."""
    return NONE if interval is None else f"{interval:.{digits}f}".replace("-", MINUS)


def signed_interval(interval: Interval, digits: int = 2) -> str:
    """Writes a difference and the ends of its interval, with signs, such as "+0.12 [+0.03, +0.21]"."""
    return f"{interval:+.{digits}f}".replace("-", MINUS)
