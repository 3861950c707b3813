"""Finds what holds a run: settings that need less memory, and the smallest slice of a chip."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from qstar_jax.config import PlanConfig
from qstar_jax.errors import InputError
from qstar_jax.plan.options import decode_plan, run_plan
from qstar_jax.plan.plan import Plan, make_run_plan, mesh_sizes
from qstar_jax.plan.topology import slice_count, slices_of

Report = Callable[[str, Plan], None]


def find_settings(config: PlanConfig, topology: str, report: Report) -> tuple[list[str], PlanConfig, Plan]:
    """Plans a run; where it does not fit, tries one setting after the other, each on top of those before it.

    Args:
        config: The options.
        topology: The hardware.
        report: Is told of each plan, and what was changed last.

    Returns:
        What was changed, the options with it, and the first plan that fits.

    Raises:
        InputError: If none does, or the options cannot be used.
    """
    plan, changed = make_run_plan(config, topology), {}
    report("as given", plan)
    smaller = _smaller_search if config.verb == "generate" else _smaller_step
    candidates = () if plan.fits or not config.search else smaller(config, topology)
    for change, candidate in candidates:
        config, plan = candidate, make_run_plan(candidate, topology)
        changed |= [change.split(" ")]  # the last value of an option
        report(change, plan)
        if plan.fits:
            break
    changes = [" ".join(change) for change in changed.items()]
    if plan.fits:
        return changes, config, plan
    tried = f", not even with {', '.join(changes)}" if changes else ""
    what = "a search" if config.verb == "generate" else "a step"
    raise InputError(f"{topology} does not hold this run{tried}; {what} needs more than the memory of a device")


def find_slice(config: PlanConfig, report: Report) -> Plan:
    """Finds the smallest slice of a chip that holds a run as it is.

    Raises:
        InputError: If none does, or the options cannot be used.
    """
    tried = []
    for topology in slices_of(config.topologies):
        if not _divides(config, topology):
            continue
        plan = make_run_plan(config, topology)
        report("as given", plan)
        if plan.fits:
            return plan
        tried.append(topology)
    is_search = config.verb == "generate"
    batch = "" if is_search else f" and train.batch_size {config.train.batch_size}"
    if not tried:
        raise InputError(f"no slice of {config.topologies} suits the mesh{batch}")
    replicated = is_search and mesh_sizes(config, tried[-1])["tensor"] == 1
    advice = "; each device holds all parameters: --mesh.tensor -1 shards them" if replicated else ""
    raise InputError(
        f"no slice of {config.topologies} that suits the mesh{batch} holds this run; tried {', '.join(tried)}{advice}"
    )


def _divides(config: PlanConfig, topology: str) -> bool:
    try:
        sizes = mesh_sizes(config, topology)
    except InputError:
        return False
    shards = sizes["data"] * sizes["fsdp"]
    return config.verb == "generate" or config.train.batch_size % (shards * config.train.accumulate) == 0


def _smaller_step(config: PlanConfig, topology: str) -> Iterator[tuple[str, PlanConfig]]:
    """Yields what needs less memory: first what costs no accuracy and little time, last what changes the training."""
    run, sizes = run_plan(config), mesh_sizes(config, topology)
    most = config.train.batch_size // (sizes["data"] * sizes["fsdp"])
    for micro_batches in range(config.train.accumulate + 1, most + 1):
        if most % micro_batches == 0 and not run.objective.couples_examples:
            config = replace(config, train=replace(config.train, accumulate=micro_batches))
            yield f"train.accumulate {micro_batches}", config
    kinds = ["none", "dots", "attention", "full"]
    for remat in ("attention", "full"):
        if kinds.index(remat) > kinds.index(config.compute.remat):
            config = replace(config, compute=replace(config.compute, remat=remat))
            yield f"compute.remat {remat}", config
    if run.holds_reference and not run.moves_reference:
        config = replace(config, reference=replace(config.reference, mode="cached"))
        yield "reference.mode cached", config
    if config.lora.rank == 0 and not run.moves_reference:
        config = replace(config, lora=replace(config.lora, rank=16))
        yield "lora.rank 16", config
    if config.compute.param_dtype == "float32":
        config = replace(config, compute=replace(config.compute, param_dtype="bfloat16"))
        yield "compute.param_dtype bfloat16", config


def _smaller_search(config: PlanConfig, topology: str) -> Iterator[tuple[str, PlanConfig]]:
    """Yields what needs less memory: first what changes no response, last what rounds."""
    sizes, slices = mesh_sizes(config, topology), slice_count(topology)
    tensor = math.prod(sizes.values()) // slices
    if sizes["tensor"] < tensor:
        config = replace(config, mesh=replace(config.mesh, data=slices, fsdp=1, tensor=tensor))
        yield f"mesh.tensor {tensor}", config
    while config.batch_size > 1 and decode_plan(config).batched:
        config = replace(config, batch_size=config.batch_size // 2)
        yield f"batch_size {config.batch_size}", config
    for option in ("param_dtype", "dtype"):
        if getattr(config.compute, option) == "float32":
            config = replace(config, compute=replace(config.compute, **{option: "bfloat16"}))
            yield f"compute.{option} bfloat16", config
