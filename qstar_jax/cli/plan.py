"""`qstar plan`."""

from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from qstar_jax.config import PlanConfig
from qstar_jax.console import say
from qstar_jax.plan.plan import Plan
from qstar_jax.report.tables import Table, print_table

GIB = 2**30


def run(config: PlanConfig):
    """Compiles a run's step for hardware that is not there, prints what it needs, and writes plan.json."""
    import jax

    from qstar_jax.plan.options import check_options, mesh_options, options_of
    from qstar_jax.plan.search import find_settings, find_slice
    from qstar_jax.store.files import write_json

    jax.config.update("jax_platforms", "cpu")  # compilers of other hardware would look for it
    console, changes = Console(), []
    if warning := check_options(config):
        say(console, warning)

    def report(change: str, plan: Plan):
        if plan.fits:
            say(console, f"{plan.topology}, {change}: fits")
        else:
            need = f"{plan.memory['total'] / GIB:.1f} GiB" if plan.memory else plan.refusal
            say(console, f"{plan.topology}, {change}: does not fit {plan.memory_limit / GIB:.1f} GiB: {need}")

    if config.topology is None:
        plan = find_slice(config, report)
    else:
        changes, config, plan = find_settings(config, config.topology, report)
    for table in tables(config, plan):
        print_table(table, console)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    config = replace(config, mesh=mesh_options(config))
    options = {name: value for name, value in asdict(config).items() if name in options_of(config)}
    write_json(out / "plan.json", {"changes": changes, **plan.to_json(), "config": options})
    say(console, f"{out / 'plan.json'}")


def tables(config: PlanConfig, plan: Plan) -> list[Table]:
    """Lays out a plan: what a device holds and computes, and what it sends, if it sends anything."""
    what = f"A batch of {config.decode.method}" if config.verb == "generate" else "A step"
    caption = f"{what} on {plan.topology}: {plan.devices} devices, {plan.memory_limit / GIB:.1f} GiB each"
    rows = [(f"memory: {name}", f"{size / GIB:.2f} GiB") for name, size in plan.memory.items()]
    rows += [(f"FLOPs: {name}", f"{flops:.3g}") for name, flops in plan.flops.items()]
    rows += [(f"seconds by {name}", f"{seconds:.3g}") for name, seconds in plan.seconds.items()]
    rows += [("binds", plan.binds)]
    if config.verb == "generate":
        rows += [("new tokens per second, all devices", f"{plan.tokens_per_second:,.0f}")]
    else:
        rows += [("expected MFU", f"{plan.expected_mfu:.2f}")]
        rows += [("tokens per second, all devices", f"{plan.tokens_per_second:,.0f}")]
    rows += [("seconds to compile", f"{plan.compile_seconds:.0f}")]
    transfers = [(kind, f"{x['count']:.0f}", f"{x['bytes'] / GIB:.2f}") for kind, x in plan.collectives.items()]
    of_transfers = Table("Transfers between devices", ("kind", "count", "GiB sent"), tuple(transfers))
    return [Table(caption, ("per device", "value"), tuple(rows)), *([of_transfers] if transfers else [])]
