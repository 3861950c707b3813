from dataclasses import dataclass
from typing import Literal

import pytest

from qstar_jax.config.variants import check_variant, fill_in, filled_in, option, selector
from qstar_jax.errors import InputError


@dataclass(frozen=True)
class Soup:
    name: Literal["tomato", "onion", "miso"] = selector("tomato")
    salt: float | None = option({"tomato": 1.0, "onion": 2.0}, bounds="[0, 5)")
    bread: Literal["white", "rye"] | None = option(["onion"], "white")
    basil: bool | None = option(["tomato"], False)
    seconds: float | Literal["default"] | None = option(["miso"], 9.0, unset="default")
    bowls: int = 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Soup(bread="rye"),
            "bread 'rye' has no effect with name tomato; onion reads it: set --soup.name onion, or leave it out",
        ),
        (
            Soup(name="onion", basil=False),
            "basil False has no effect with name onion; tomato reads it: set --soup.name tomato, or leave it out",
        ),
        (
            Soup(name="miso", salt=1.0),
            "salt 1.0 has no effect with name miso; tomato and onion read it: set --soup.name tomato, or leave it out",
        ),
        (
            Soup(seconds=None),
            "seconds None has no effect with name tomato; miso reads it: set --soup.name miso, or leave it out",
        ),
        (Soup(salt=5), "salt is 5; expected a number in [0, 5)"),
        (Soup(salt=float("nan")), "salt is nan; expected a number in [0, 5)"),
        (Soup(salt=True), "salt is True; expected a number in [0, 5)"),
        (Soup(name="onion", bread="oat"), "bread 'oat' is unknown; choose from white, rye"),
        (Soup(name="pea"), "name 'pea' is unknown; choose from tomato, onion, miso"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError) as error:
        check_variant(options, "soup")
    assert str(error.value) == f"soup: {message}"


def test_what_is_read_is_taken():
    for options in (Soup(), Soup(salt=0, basil=True), Soup(name="onion", bread="rye", bowls=3), Soup(name="miso")):
        check_variant(options, "soup")
    check_variant(Soup(name="miso", seconds=None), "soup")  # None may be a value of its own


def test_defaults_of_the_variant_are_filled_in():
    assert fill_in(Soup()) == Soup(salt=1.0, basil=False, seconds=None)
    assert fill_in(Soup(name="onion", bread="rye")) == Soup(name="onion", salt=2.0, bread="rye", seconds=None)
    assert fill_in(Soup(name="miso")).seconds == 9.0
    assert fill_in(Soup(name="miso", seconds=None)).seconds is None


def test_stored_options_are_filled_in_and_unread_ones_are_left_out():
    stored = {"name": "onion", "salt": None, "bread": "rye", "basil": False}
    assert stored | filled_in(stored, Soup) == stored | {"salt": 2.0, "basil": None, "seconds": None}
