"""Arguments of searches, checked by name before anything is compiled."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.models.function import check_model
from qstar_jax.shapes import show_shape

Search = TypeVar("Search", bound=Callable)


def checks_prompts(search: Search) -> Search:
    """Makes a compiled search `(model, params, prompts, prompt_lengths, ...)` check its model and its prompts first.

    Lists become arrays. Inside of `jax.jit` values are unknown, and shapes alone are checked.

    Raises:
        InputError: On a call whose model is none, or whose prompts are no right-padded token ids of these lengths.
    """

    @functools.wraps(search)
    def checked(model: Any, params: Any, prompts: Any, prompt_lengths: Any, *arguments: Any, **options: Any):
        check_model(model, "prefill")
        prompts, prompt_lengths = _int_array("prompts", prompts), _int_array("prompt_lengths", prompt_lengths)
        _check_prompts(prompts, prompt_lengths)
        return search(model, params, prompts, prompt_lengths, *arguments, **options)

    checked.lower = search.lower
    return checked


def _int_array(name: str, values: Any) -> Any:
    try:
        array = values if hasattr(values, "dtype") else np.asarray(values)
    except ValueError as error:
        raise InputError(
            f"{name}: rows of different lengths; expected rows padded at their ends to one length"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name} {show_shape(array.shape)} are {array.dtype}: expected integers")
    return jnp.asarray(array)


def _check_prompts(prompts: jax.Array, lengths: jax.Array):
    if prompts.ndim != 2 or not prompts.size:
        fix = "; put the prompt into a list: [prompt]" if prompts.ndim == 1 else ""
        raise InputError(f"prompts {show_shape(prompts.shape)}: expected token ids [B, P], padded at the end{fix}")
    if lengths.shape != prompts.shape[:1]:
        raise InputError(
            f"prompt_lengths {show_shape(lengths.shape)}: expected one length for each of {len(prompts)} prompts"
        )
    if not (_is_known(prompts) and _is_known(lengths)):
        return
    ids, tokens = np.asarray(prompts), np.asarray(lengths)
    if tokens.min() < 1 or tokens.max() > ids.shape[1]:
        row = int(np.argmax((tokens < 1) | (tokens > ids.shape[1])))
        raise InputError(f"prompt_lengths[{row}] is {tokens[row]}: expected 1 to {ids.shape[1]}, the tokens of prompts")
    used = ids[np.arange(ids.shape[1]) < tokens[:, None]]  # padding may be anything
    if used.min() < 0:
        raise InputError(f"prompts hold the token id {used.min()}: expected ids from 0 on")


def _is_known(x: jax.Array) -> bool:
    """Whether this process has the values: they are no tracers, and no parts of them lie elsewhere."""
    return not isinstance(x, jax.core.Tracer) and (x.is_fully_addressable or x.is_fully_replicated)


def token_id_tuple(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    """Reads token ids of an option, as a tuple, which can be hashed.

    Raises:
        InputError: They are no list of token ids.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and (not np.issubdtype(array.dtype, np.integer) or array.min() < 0)):
        raise InputError(f"{name} {ids!r}: expected token ids, from 0 on")
    return tuple(array.tolist())


def check_eos_ids(eos_ids: tuple[int, ...], vocabulary: int):
    """Refuses ends of responses of which a model has none, so that no response would end.

    Raises:
        InputError: No id is below the number of tokens of the vocabulary.
    """
    if eos_ids and min(eos_ids) >= vocabulary:
        raise InputError(
            f"eos_ids {eos_ids}: {eos_ids[0]} is none of the {vocabulary} tokens of the model's vocabulary"
        )
