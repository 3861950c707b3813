"""Finds what holds a run: settings that need less memory, and the smallest slice of a chip."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from qstar_jax.config import PlanConfig
from qstar_jax.errors import InputError
from qstar_jax.plan.plan import Plan, make_run_plan, run_options
from qstar_jax.plan.topology import slices_of, topology_devices
from qstar_jax.sharding import make_mesh
from qstar_jax.training.plan import make_plan

Report = Callable[[str, Plan], None]


def find_settings(config: PlanConfig, topology: str, report: Report) -> tuple[list[str], Plan]:
    """Plans a run; where it does not fit, tries one setting after the other, each on top of those before it.

    Args:
        config: The options.
        topology: The hardware.
        report: Is told of each plan, and what was changed last.

    Returns:
        What was changed, and the first plan that fits.

    Raises:
        InputError: If none does, or the options cannot be used.
    """
    plan, changes = make_run_plan(config, topology), []
    report("as given", plan)
    candidates = () if plan.fits or not config.search else _smaller(config, topology)
    for change, candidate in candidates:
        plan = make_run_plan(candidate, topology)
        changes.append(change)
        report(change, plan)
        if plan.fits:
            break
    if plan.fits:
        return changes, plan
    tried = f", not even with {', '.join(changes)}" if changes else ""
    raise InputError(f"{topology} does not hold this run{tried}; a step needs more than the memory of a device")


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
    if not tried:
        raise InputError(
            f"no slice of {config.topologies} suits the mesh and train.batch_size {config.train.batch_size}"
        )
    raise InputError(
        f"no slice of {config.topologies} over which train.batch_size {config.train.batch_size} divides holds this "
        f"run; tried {', '.join(tried)}"
    )


def _divides(config: PlanConfig, topology: str) -> bool:
    devices = topology_devices(topology)
    try:
        mesh = make_mesh(config.mesh, devices)
    except InputError:
        return False
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return config.train.batch_size % (shards * config.train.accumulate) == 0


def _smaller(config: PlanConfig, topology: str) -> Iterator[tuple[str, PlanConfig]]:
    """Yields what needs less memory: first what costs no accuracy and little time, last what changes the training."""
    run = make_plan(run_options(config))
    mesh = make_mesh(config.mesh, topology_devices(topology))
    most = config.train.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
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
