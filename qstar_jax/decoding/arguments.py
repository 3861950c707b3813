"""Arguments of searches, checked by name before anything is compiled."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qstar_jax.errors import InputError
from qstar_jax.models.function import check_model
from qstar_jax.shapes import show_shape

Search = TypeVar("Search", bound=Callable)


def checks_arguments(search: Search) -> Search:
    """Makes a compiled search `(model, params, prompts, prompt_lengths, ...)` check what it is given first.

    Its `options` are of the class with which they are annotated; its `keys`, if it has any, are one for each prompt.
    Lists become arrays. Inside of `jax.jit` values are unknown, and shapes alone are checked.

    Raises:
        InputError: On a call whose model is none, whose prompts are no right-padded token ids of these lengths, or
            whose options or keys are something else.
    """
    signature = inspect.signature(search)
    kind = signature.parameters["options"].annotation

    @functools.wraps(search)
    def checked(*arguments: Any, **named: Any):
        bound = signature.bind(*arguments, **named)
        given = bound.arguments
        check_model(given["model"], "prefill")
        given |= {name: _int_array(name, given[name]) for name in ("prompts", "prompt_lengths")}
        _check_prompts(given["prompts"], given["prompt_lengths"])
        if not isinstance(given["options"], kind):
            raise InputError(f"options are a {type(given['options']).__name__}: expected {kind.__name__}")
        if given.get("keys") is not None:
            _check_keys(given["keys"], len(given["prompts"]))
        return search(*bound.args, **bound.kwargs)

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


def _check_keys(keys: Any, count: int):
    shape = getattr(keys, "shape", None)
    if shape is None or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        found = f"a {type(keys).__name__}" if shape is None else f"{keys.dtype} {show_shape(shape)}"
    elif shape == (count,):
        return
    else:
        found = f"of shape {show_shape(shape)}"
    raise InputError(
        f"keys are {found}: expected one for each prompt, such as jax.random.split(jax.random.key(0), {count})"
    )


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
