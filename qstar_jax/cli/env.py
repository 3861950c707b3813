"""`qstar env`."""

import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from qstar_jax import __version__
from qstar_jax.config import EnvConfig

PACKAGES = "jax jaxlib flax optax orbax-checkpoint transformers datasets numpy torch libtpu".split()


def run(config: EnvConfig):
    """Prints versions and devices."""
    import jax

    from qstar_jax._compat import TESTED_PAIRS

    table = Table(show_header=False, box=None)
    table.add_row("qstar_jax", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    table.add_row("tested pairs", ", ".join(f"jax {jax_} + flax {flax}" for jax_, flax in TESTED_PAIRS))
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        size = f", {memory / 2**30:.0f} GiB" if memory else ""
        table.add_row(f"device {device.id}", f"{device.device_kind}{size}")
    Console().print(table)
