"""The options of the verb that is planned: its own are read, those of others refused."""

from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qstar_jax.config import DpoConfig, GenerateConfig, MeshOptions, PlanConfig, SftConfig
from qstar_jax.config.ranges import check_ranges
from qstar_jax.data.tokenization import Example
from qstar_jax.decoding.options import DecodePlan, interpret
from qstar_jax.errors import InputError
from qstar_jax.losses import make_loss
from qstar_jax.models import CausalLM
from qstar_jax.plan.step import pairs_of_lengths
from qstar_jax.store.checkpoints import find_checkpoint, read_description
from qstar_jax.store.hub.folder import read_config_of
from qstar_jax.training.plan import RunPlan, make_plan

_VERBS = {"dpo": DpoConfig, "sft": SftConfig, "generate": GenerateConfig}


def check_options(config: PlanConfig) -> str | None:
    """Checks all that can be checked before anything is compiled.

    Returns:
        A warning, or None.

    Raises:
        InputError: If options have no effect, contradict each other, or do not fit the model.
    """
    check_ranges(config)
    if (config.topology is None) == (config.topologies is None):
        raise InputError("give either --topology, such as v5e:4x4, or --topologies, such as v5e")
    if config.topologies is not None and not config.search:
        raise InputError("--search false has no effect with --topologies, which looks for the slice that holds the run")
    for option, value in without_effect(config):
        raise InputError(f"--{option} {value} has no effect with --verb {config.verb}; leave it out")
    if config.verb != "generate":
        run_plan(config)
        return read_model(config, config.model).check_length(sum(lengths_of(config)), "prompt and response")
    new_tokens = decode_plan(config).block.max_new_tokens
    what = f"a prompt and {new_tokens} new tokens"
    return read_models(config)[0].check_length(prompt_length_of(config) + new_tokens, what)


def without_effect(config: PlanConfig) -> Iterator[tuple[str, Any]]:
    """Yields dotted name and value of the options that were given, but are not for the verb."""
    read, unset = options_of(config), PlanConfig(model="", out="")
    for field in fields(config):
        if field.name not in read:
            yield from _differences(field.name, getattr(config, field.name), getattr(unset, field.name))


def options_of(config: PlanConfig) -> dict[str, Any]:
    """Returns the options that the verb has, by name."""
    names = {field.name for field in fields(_VERBS[config.verb])} - {"resume", "prompt"}
    names |= {"verb", "topology", "topologies", "search", "prompt_length"}
    if config.verb != "generate":
        names.add("response_length")
    if (config.verb == "generate") != isinstance(config.reference, str):  # a model for one, options for the other
        names.discard("reference")
    return {name: getattr(config, name) for name in names}


def _differences(name: str, value: Any, default: Any) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        for field in fields(value):
            yield from _differences(f"{name}.{field.name}", getattr(value, field.name), getattr(default, field.name))
    elif value != default:
        yield name, value


def run_plan(config: PlanConfig) -> RunPlan:
    """Returns the plan of a run of `dpo` or `sft`, as the verb makes it.

    Raises:
        InputError: If options contradict each other.
    """
    # No file is read, so none need be named; without data, the length of an epoch is unknown.
    data = replace(config.data, train=config.data.train or "examples of one length")
    train = replace(config.train, steps=config.train.steps or int(config.optimizer.warmup_steps) + 1)
    kind = _VERBS[config.verb]
    options = {field.name: getattr(config, field.name) for field in fields(kind)}
    return make_plan(kind(**options | {"data": data, "train": train, "mesh": mesh_options(config)}))


def decode_plan(config: PlanConfig) -> DecodePlan:
    """Returns the `decode:` block, interpreted as `generate` does.

    Raises:
        InputError: If options contradict each other.
    """
    plan = interpret(config.decode, len(config.pairs))
    if config.batch_size < 1:
        raise InputError(f"--batch_size {config.batch_size}: expected at least 1 prompt per batch")
    if isinstance(config.reference, str) and not plan.needs_reference:
        raise InputError(
            f"--reference {config.reference} has no effect with method {config.decode.method} and this objective; set "
            "--decode.report_reference true, or an objective that reads it (--decode.objective implicit_reward)"
        )
    return plan


def mesh_options(config: PlanConfig) -> MeshOptions:
    """Returns the options of the mesh, with the defaults of the verb filled in."""
    order = ("data", "fsdp") if config.verb == "generate" else ("fsdp", "data")
    sizes = {axis: getattr(config.mesh, axis) for axis in (*order, "tensor")}
    filled = {axis: 1 if size is None else size for axis, size in sizes.items()}
    unset = [axis for axis in order if sizes[axis] is None]
    if unset and -1 not in filled.values():
        filled[unset[0]] = -1
    return MeshOptions(**asdict(config.mesh) | filled)


def read_models(config: PlanConfig) -> list[CausalLM]:
    """Reads the shapes of the policy, and of the models that run beside it in decoding.

    Raises:
        InputError: If one cannot be read, or they cannot have the same tokens.
    """
    policy = read_model(config, config.model)
    if decode_plan(config).needs_reference:
        # A reference that is not named is that of the policy's run, which has its shape.
        named = isinstance(config.reference, str)
        others = [(config.reference, read_model(config, config.reference)) if named else (config.model, policy)]
    else:
        names = [name for pair in config.pairs for name in (pair.tuned, pair.untuned)]
        others = [(name, read_model(config, name)) for name in names]
    vocabulary = config.decode.vocabulary
    for name, other in others:
        sizes = policy.config.vocab_size, other.config.vocab_size
        if (vocabulary is None and sizes[0] != sizes[1]) or (vocabulary or 0) > min(sizes):
            raise InputError(
                f"{name} has a vocabulary of {sizes[1]} tokens, and {config.model} one of {sizes[0]} "
                f"(decode.vocabulary: {vocabulary}); models that are compared token by token need the same"
            )
    return [policy, *(other for _, other in others)]


def read_model(config: PlanConfig, name: str) -> CausalLM:
    """Reads the shape of a model, without its weights.

    Raises:
        InputError: If there is no usable config.json.
    """
    checkpoint = find_checkpoint(Path(name).expanduser())
    if checkpoint is None:
        return CausalLM.from_hf(read_config_of(name), config.compute)
    return read_description(checkpoint).build_model(config.compute).base


def examples_of(config: PlanConfig) -> list[Example]:
    """Returns the examples of one batch of training, all as long as the options say."""
    pairs = pairs_of_lengths(*lengths_of(config), config.train.batch_size)
    loss = None if config.verb == "sft" else make_loss(**asdict(config.loss))
    if loss is not None and not loss.reads_single:
        return pairs
    # Single responses; KTO takes a second one, of another prompt. Values do not matter.
    responses, outcome = 1, {}
    if loss is not None:
        responses = 2 if "baseline" in loss.arrays else 1
        values = {"labels": np.asarray(True), "rewards": np.float32(0), "reference_rewards": np.zeros(8, np.float32)}
        outcome = {name: values[name] for name in loss.arrays & values.keys()}
    return [replace(pair, responses=pair.responses[:responses], outcome=outcome) for pair in pairs]


def prompt_length_of(config: PlanConfig) -> int:
    """Returns the number of tokens of a prompt.

    Raises:
        InputError: If it is not positive.
    """
    length = config.data.prompt_limit if config.prompt_length is None else config.prompt_length
    if length < 1:
        raise InputError(f"a prompt of {length} tokens: expected at least 1; set --prompt_length")
    return length


def lengths_of(config: PlanConfig) -> tuple[int, int]:
    """Returns the numbers of tokens of a prompt and of a response in training.

    Raises:
        InputError: If one is not positive.
    """
    prompt = prompt_length_of(config)
    response = config.data.max_length - prompt if config.response_length is None else config.response_length
    if response < 1:
        raise InputError(
            f"a prompt of {prompt} and a response of {response} tokens: expected at least 1 of each; set "
            "--prompt_length and --response_length, or data.max_length above data.max_prompt_length"
        )
    return prompt, response
