"""Identities of models, and the identity file next to each output that depends on them."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from qstar_jax.config.compare import first_difference
from qstar_jax.data.identity import tokenizer_identity
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.store.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Explains a difference, by the last part of its name.
_EXPLANATIONS = {
    "parameters": "other weights under the same name, as after training again",
    "tokenizer": "another vocabulary, chat template or set of special tokens",
    "sha256": "other examples",
}


def model_identity(model: CausalLM, params: Params, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Identifies a model, independently of its folder and its mesh; all processes of a job must call this together.

    Returns:
        The configuration, and digests of the parameters (bit by bit) and of the tokenizer.
    """
    return {
        "type": model.model_type,
        "config": _config(model),
        "parameters": params_identity(params),
        "tokenizer": tokenizer_identity(tokenizer),
    }


def weights_identity(model: CausalLM, params: Params) -> str:
    """Identifies a frozen model in one line: its parameters, bit by bit, and its configuration.

    All processes of a job must call this together.
    """
    return f"{params_identity(params)} {model.model_type} {json.dumps(_config(model), sort_keys=True)}"


def _config(model: CausalLM) -> dict[str, Any]:
    """Returns the keys of config.json that determine a model's numbers, and the run's choice of longrope."""
    longrope = {} if model.config.longrope_context is None else {"longrope": model.compute.longrope}
    return model.family.write(model.config) | longrope


def check_weights(model: CausalLM, params: Params, recorded: str | None, folder: Path, fix: str):
    """Checks that a folder still holds the parameters that a run recorded.

    Args:
        model: The model in the folder.
        params: Its parameters.
        recorded: The recorded `weights_identity`; None: nothing was recorded.
        folder: The folder, for the error.
        fix: What the user can do other than restore the folder, for the error.

    Raises:
        InputError: If they differ.
    """
    if recorded is not None and recorded != weights_identity(model, params):
        raise InputError(
            f"{folder} has changed since the run began (its parameters differ from those recorded in the checkpoint); "
            f"restore that folder, or {fix}"
        )


def params_identity(params: Params) -> str:
    """Digests parameters bit by bit without gathering them: equal on every mesh, different if any bit changes or moves.

    A change of a single element is always detected, other changes except with probability 2^-64; the checksums are not
    cryptographic. Only two scalars per array leave the devices. All processes of a job must call this together.

    Returns:
        SHA-256 over paths, shapes, dtypes and checksums, in hexadecimal digits.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    checksums = jax.device_get([_checksums(leaf) for _, leaf in leaves])
    entries = [
        [jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, str(leaf.dtype), *map(int, pair)]
        for (path, leaf), pair in zip(leaves, checksums, strict=True)
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


@jax.jit
def _checksums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums two hashes of (position, bits) modulo 2^32, in any order.

    Weighted sums of the bits would not do: with odd weights, x and -x (whose bits differ by 2^31) could be swapped.
    """
    words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)

    def hashes(seed: int) -> jax.Array:
        # Mix in one index per axis: a flat index would overflow, and would not be computed shard by shard.
        position = jnp.uint32(seed)
        for axis, size in enumerate(bits.shape):
            index = jax.lax.iota(jnp.uint32, size).reshape([-1 if i == axis else 1 for i in range(bits.ndim)])
            position = _mix(position + index)
        return _mix(bits + position)  # one-to-one in `bits` at each position

    # A single reduction, which XLA fuses with the hashes; on a CPU, two sums would materialize them first.
    zeros = (jnp.uint32(0), jnp.uint32(0))
    pairs = (hashes(0x9E3779B9), hashes(0x85EBCA6B))
    return jax.lax.reduce(pairs, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), range(x.ndim))


def _mix(x: jax.Array) -> jax.Array:
    """Permutes the 32-bit integers, scattering neighbors (lowbias32 by Chris Wellons)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity_file(output: Path) -> Path:
    """Returns the path of the identity of a file: generations.identity.json next to generations.jsonl."""
    return output.with_suffix(".identity.json")


def write_identity(output: Path, identity: dict[str, Any]):
    """Writes the identity of a file, everything that it depends on, next to it."""
    write_json(identity_file(output), identity)


def check_identity(output: Path, identity: dict[str, Any], *, holds: str, fix: str):
    """Checks that a file depends on the same things as this run, before continuing it.

    Raises:
        InputError: If the file has no identity, or another one.
    """
    path = identity_file(output)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        difference = first_difference(stored, json.loads(json.dumps(identity)))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing, so it is unknown which model made the {holds} in {output.name} (older versions of "
            f"qstar_jax did not write it); {fix}"
        ) from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not readable as the identity of {output.name} ({error}); {fix}") from error
    if difference:
        name, before, now = difference
        explanation = _EXPLANATIONS.get(name.rpartition(".")[2])
        raise InputError(
            f"{output.parent} holds {holds} made with {name} {_abbreviate(before)}, and it is {_abbreviate(now)} now"
            f"{f' ({explanation})' if explanation else ''}; {fix}"
        )


def _abbreviate(value: Any) -> str:
    """Formats a value, shortening digests."""
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if is_digest else repr(value)
