"""One scale from reward to colour for every view: red below zero, nothing at zero, blue above.

Red and blue stay apart for the colour-blind. Each half is a list of stops from zero outwards, after ColorBrewer's RdBu.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_PERCENTILE = 98
_HEADROOM = 3.0


@dataclass(frozen=True)
class Ramp:
    """Colours for one kind of background.

    Args:
        negative: Stops from zero to the lowest reward, as "#rrggbb".
        positive: Stops from zero to the highest reward; begins with the same colour.
    """

    negative: tuple[str, ...]
    positive: tuple[str, ...]


LIGHT = Ramp(("#ffffff", "#fde0d2", "#f6ab8d", "#dd6a56"), ("#ffffff", "#d9e9f4", "#97c6e2", "#4d9acb"))
DARK = Ramp(("#1b1e24", "#4a2a28", "#83362f", "#b9473a"), ("#1b1e24", "#22384d", "#26557f", "#2b74ae"))
# The terminal's own background is unknown: strength is saturation at middle lightness, legible on black and on white.
TERMINAL = Ramp(("#6d7076", "#86605d", "#a44b43", "#b93427"), ("#6d7076", "#5a7085", "#3c6f9c", "#1b6cb0"))


def reward_scale(rewards: Iterable[float]) -> float:
    """Finds the reward that gets the full colour, for all responses that are shown together.

    The largest |reward|, but at most three times the 98th percentile: the maximum alone would let one odd token wash
    out all others, the percentile alone would paint ordinary noise as deep as the one token that matters.

    Args:
        rewards: Token rewards of all responses; those that are not finite are skipped.

    Returns:
        A positive number of nats; 1 where every reward is zero.
    """
    sizes = np.abs([reward for reward in rewards if math.isfinite(reward)])
    if not sizes.any():
        return 1.0
    return float(min(sizes.max(), _HEADROOM * np.percentile(sizes, _PERCENTILE)) or sizes.max())


def strength(reward: float, scale: float) -> float:
    """Places a reward (nats) on the scale: a number in [-1, 1], clipped; 0 for what is not a number."""
    return 0.0 if math.isnan(reward) else max(-1.0, min(1.0, reward / scale))


def reward_colour(reward: float, scale: float, ramp: Ramp) -> str:
    """Finds the background colour of a token, where `scale` is the reward of the full colour (both in nats)."""
    place = strength(reward, scale)
    stops = ramp.negative if place < 0 else ramp.positive
    step = abs(place) * (len(stops) - 1)
    mixed = [np.interp(step, range(len(stops)), channel) for channel in zip(*map(_channels, stops), strict=True)]
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def text_colour(background: str) -> str:
    """Chooses near-black or white text, whichever has the higher contrast (WCAG 2) to the background."""
    return max("#14161a", "#ffffff", key=lambda ink: contrast(ink, background))


def contrast(one: str, other: str) -> float:
    """Returns the contrast ratio of two colours (WCAG 2), from 1 to 21; body text should have 4.5."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in _channels(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
