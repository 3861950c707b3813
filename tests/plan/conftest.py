from collections.abc import Callable

import jax
import pytest

from qstar_jax.errors import InputError
from qstar_jax.plan.topology import topology_devices


@pytest.fixture(scope="session")
def devices_of() -> Callable[[str], list[jax.Device]]:
    """The devices of a topology; skips a test where a package is missing that compiles for it."""

    def devices(topology: str) -> list[jax.Device]:
        try:
            return topology_devices(topology)
        except InputError as error:
            if "pip install" not in str(error):
                raise
            pytest.skip(str(error))

    return devices
