"""The user's cache folder, which keeps compiled programs and reference log-probabilities between runs."""

import os
from pathlib import Path

import jax

_MIN_COMPILE_SECS = 0.1  # JAX's default of a second would skip most programs of small models


def user_cache(name: str) -> Path:
    """Returns the folder of one kind of cache, under $XDG_CACHE_HOME or ~/.cache; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qstar_jax" / name


def keep_programs():
    """Enables JAX's compilation cache on disk, unless the user has configured it (JAX_COMPILATION_CACHE_DIR).

    Disabled on a CPU with several devices: cached programs may enter their collectives in a different order on each
    device and deadlock (jaxlib 0.10.2).
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None:
        return
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        return
    jax.config.update("jax_compilation_cache_dir", str(user_cache("programs")))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECS)
