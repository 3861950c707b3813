"""The one door to Flax: a jax/flax pair that does not fit gives one plain sentence instead of an AttributeError."""

from importlib.metadata import PackageNotFoundError, version

TESTED_PAIRS = (("0.10.2", "0.12.8"), ("0.12.0.1", "0.12.12"))  # (jax, flax) that the whole test suite has passed on


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def mismatch_message() -> str:
    """Returns the sentence that a user sees when Flax does not import beside the installed JAX."""
    pairs = " or ".join(f"'jax=={jax}' 'flax=={flax}'" for jax, flax in TESTED_PAIRS)
    return (
        f"jax {_version('jax')} and flax {_version('flax')} do not work together; "
        f"install a tested pair: pip install {pairs}"
    )


try:
    from flax import nnx as nnx
except (AttributeError, ImportError) as error:
    raise ImportError(mismatch_message()) from error
