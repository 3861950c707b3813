"""The scale from reward to colour."""

import math

import pytest

from qstar_jax.report.colours import (
    DARK,
    LIGHT,
    TERMINAL,
    contrast,
    reward_colour,
    reward_scale,
    strength,
    text_colour,
)

RAMPS = pytest.mark.parametrize("ramp", [LIGHT, DARK, TERMINAL], ids=["light", "dark", "terminal"])


def _red_and_blue(colour: str) -> tuple[int, int]:
    return int(colour[1:3], 16), int(colour[5:7], 16)


def test_strength_is_symmetric_and_clipped():
    for reward in (0.0, 0.1, 0.35, 0.7):
        assert strength(-reward, 0.7) == -strength(reward, 0.7)
    assert strength(0.35, 0.7) == 0.5
    assert strength(50.0, 0.7) == 1.0
    assert strength(-math.inf, 0.7) == -1.0
    assert strength(math.nan, 0.7) == 0.0


@RAMPS
def test_zero_is_neutral_and_the_ends_are_the_poles(ramp):
    assert reward_colour(0.0, 2.0, ramp) == ramp.negative[0] == ramp.positive[0]
    assert reward_colour(-2.0, 2.0, ramp) == reward_colour(-9.0, 2.0, ramp) == ramp.negative[-1]
    assert reward_colour(2.0, 2.0, ramp) == reward_colour(9.0, 2.0, ramp) == ramp.positive[-1]


@RAMPS
def test_red_below_zero_and_blue_above_by_growing_amounts(ramp):
    sizes = [0.1, 0.3, 0.5, 0.7, 0.9]
    lows = [_red_and_blue(reward_colour(-size, 1.0, ramp)) for size in sizes]
    highs = [_red_and_blue(reward_colour(size, 1.0, ramp)) for size in sizes]
    assert all(red > blue for red, blue in lows) and all(blue > red for red, blue in highs)
    assert sorted(lows, key=lambda pair: pair[0] - pair[1]) == lows
    assert sorted(highs, key=lambda pair: pair[1] - pair[0]) == highs


@RAMPS
def test_text_is_legible_on_every_colour(ramp):
    for step in range(-20, 21):
        background = reward_colour(step / 20, 1.0, ramp)
        assert contrast(text_colour(background), background) >= 4.5


def test_the_pages_own_inks_are_legible():
    for step in range(-20, 21):
        assert text_colour(reward_colour(step / 20, 1.0, LIGHT)) == "#14161a"
        assert text_colour(reward_colour(step / 20, 1.0, DARK)) == "#ffffff"


def test_contrast_of_black_and_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#ffffff", "#ffffff") == pytest.approx(1.0)


def test_scale_is_the_maximum_unless_that_stands_alone():
    assert reward_scale([0.1, -0.4, 0.3]) == pytest.approx(0.4)
    assert reward_scale([0.1, -0.1] * 100 + [-50.0]) == pytest.approx(0.3)


def test_scale_is_positive_for_odd_input():
    assert reward_scale([]) == 1.0
    assert reward_scale([0.0, 0.0]) == 1.0
    assert reward_scale([math.nan, math.inf, 0.2]) == pytest.approx(0.2)
    assert reward_scale([0.0] * 200 + [0.2]) == pytest.approx(0.2)
