"""What is kept between runs in the user's cache folder: compiled programs, and references' log-probabilities."""

import os
from pathlib import Path

import jax

WORTH_KEEPING = 0.1  # seconds of compilation; JAX itself keeps what took a second, as few programs of small models do


def user_cache(name: str) -> Path:
    """Folder of one kind of cache, under $XDG_CACHE_HOME or ~/.cache.

    Args:
        name: The kind.

    Returns:
        The folder; it need not exist.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qstar_jax" / name


def keep_programs():
    """Lets JAX keep compiled programs on disk, where the user has not said otherwise (JAX_COMPILATION_CACHE_DIR).

    Not on a CPU with several devices: programs with collectives that come out of the cache can enter these in another
    order on each device, and wait for each other for ever (jaxlib 0.10.2).
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None:
        return
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        return
    jax.config.update("jax_compilation_cache_dir", str(user_cache("programs")))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
