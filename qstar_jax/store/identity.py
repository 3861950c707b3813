"""Who made what is kept on disk: models, tokenizers and examples told apart, and the record that lies beside it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar_jax.config.compare import first_difference
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.store.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a difference in the last part of a name means to people.
_MEANING = {
    "parameters": "other weights under the same name, as after training again",
    "tokenizer": "another vocabulary, chat template or set of special tokens",
    "sha256": "other examples",
}


def model_identity(model: CausalLM, params: Params, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Identifies a model, wherever it lies and whatever mesh it is on.

    Args:
        model: The model.
        params: Its parameters; in a job of several processes all must call this together.
        tokenizer: Its tokenizer.

    Returns:
        Digests of parameters (bit by bit) and tokenizer, and the configuration by name.
    """
    return {
        "type": model.model_type,
        "config": _shape(model),
        "parameters": params_identity(params),
        "tokenizer": tokenizer_identity(tokenizer),
    }


def weights_identity(model: CausalLM, params: Params) -> str:
    """Says in one line who a frozen model is: its parameters, bit by bit, and its shape.

    Args:
        model: The model.
        params: Its parameters; in a job of several processes all must call this together.

    Returns:
        A line of text.
    """
    return f"{params_identity(params)} {model.model_type} {json.dumps(_shape(model), sort_keys=True)}"


def _shape(model: CausalLM) -> dict[str, Any]:
    """What a config.json says of a model's numbers, and the choice that longrope leaves to a run."""
    longrope = {} if model.config.longrope_context is None else {"longrope": model.compute.longrope}
    return model.family.write(model.config) | longrope


def params_identity(params: Params) -> str:
    """Digests parameters bit by bit, on the devices that hold them.

    The digest does not depend on the mesh, and changes when any bit changes or moves: always for a change of one
    element, for others but for a chance of 2^-64 (the checksums are not cryptographic). Of each array only two scalars
    leave the devices. In a job of several processes all must call this together.

    Args:
        params: Tree of arrays, on any shardings.

    Returns:
        SHA-256 over paths, shapes, types and checksums, in hexadecimal digits.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_checksums(leaf) for _, leaf in leaves])
    entries = [
        [jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, str(leaf.dtype), *map(int, pair)]
        for (path, leaf), pair in zip(leaves, sums, strict=True)
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


@jax.jit
def _checksums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two sums modulo 2^32 over hashes of (position, bits), which any order of the additions leaves the same.

    Sums of bits times weights would not do: with odd weights, x and -x (whose bits differ by 2^31) could be swapped.
    """
    words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)

    def hashes(seed: int) -> jax.Array:
        # Mix in one axis after the other: a flat index would overflow, and would not be computed shard by shard.
        position = jnp.uint32(seed)
        for axis, size in enumerate(bits.shape):
            index = jax.lax.iota(jnp.uint32, size).reshape([-1 if i == axis else 1 for i in range(bits.ndim)])
            position = _mix(position + index)
        return _mix(bits + position)  # one-to-one in `bits` at each position

    # One reduction for both sums: XLA fuses it with the hashes on CPUs too, where two sums would store all hashes.
    zeros = (jnp.uint32(0), jnp.uint32(0))
    pairs = (hashes(0x9E3779B9), hashes(0x85EBCA6B))
    return jax.lax.reduce(pairs, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), range(x.ndim))


def _mix(x: jax.Array) -> jax.Array:
    """Permutes the 32-bit integers so that neighbours scatter (Chris Wellons's lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def check_weights(model: CausalLM, params: Params, recorded: str | None, folder: Path, fix: str):
    """Refuses parameters that are not those which a run has put into a folder.

    Args:
        model: The model that the folder holds.
        params: Its parameters.
        recorded: `weights_identity` of those; None where the run does not say.
        folder: The folder, for the error.
        fix: What the user can do beside putting the folder back, for the error.

    Raises:
        InputError: If they differ.
    """
    if recorded is not None and recorded != weights_identity(model, params):
        raise InputError(
            f"{folder} is not the one with which the run began (its parameters differ from what the checkpoint says of "
            f"them); put that folder back, or {fix}"
        )


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Digests what decides between text and ids: vocabulary, rules, special tokens and chat templates.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # each call sets these anew
        rules.pop(state, None)
    parts = [rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def examples_identity(examples: Sequence[Example]) -> dict[str, Any]:
    """Says which examples these are: how many, and a digest of their tokens in order."""
    digest = hashlib.sha256()
    digest_examples(digest, examples)
    return {"rows": len(examples), "sha256": digest.hexdigest()}


def digest_examples(digest: "hashlib._Hash", examples: Sequence[Example]):
    """Adds the tokens of examples to a digest: prompts and responses, in order."""
    for example in examples:
        sequences = [example.prompt, *(response.ids for response in example.responses)]
        # Lengths go first, so that no token can move from a prompt to its response unnoticed.
        digest.update(np.array([len(sequences), *map(len, sequences)], "<i8"))
        for ids in sequences:
            digest.update(np.ascontiguousarray(ids, "<i4"))


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity_file(output: Path) -> Path:
    """Where the identity of what made a file is kept: generations.identity.json beside generations.jsonl."""
    return output.with_suffix(".identity.json")


def write_identity(output: Path, identity: dict[str, Any]):
    """Writes who makes a file, beside it.

    Args:
        output: The file; its folder is there.
        identity: What it depends on, as nested dictionaries.
    """
    write_json(identity_file(output), identity)


def check_identity(output: Path, identity: dict[str, Any], *, holds: str, fix: str):
    """Refuses to go on with a file that something else has made.

    Args:
        output: The file.
        identity: What would go on with it.
        holds: What the file holds, for the error.
        fix: What the user can do, for the error.

    Raises:
        InputError: If the file does not say who made it, or it was somebody else.
    """
    path = identity_file(output)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        different = first_difference(stored, json.loads(json.dumps(identity)))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing, so nothing says which model made the {holds} in {output.name} (an earlier version of "
            f"qstar_jax wrote none); {fix}"
        ) from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not readable as the identity of {output.name} ({error}); {fix}") from error
    if different:
        name, before, now = different
        meaning = _MEANING.get(name.rpartition(".")[2])
        raise InputError(
            f"{output.parent} holds {holds} made with {name} {_shown(before)}, and it is {_shown(now)} now"
            f"{f' ({meaning})' if meaning else ''}; {fix}"
        )


def _shown(value: Any) -> str:
    """A value for people: digests by their beginning."""
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if is_digest else repr(value)
