"""`qstar plan`."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from qstar_jax.config import PlanConfig
from qstar_jax.config.paths import recorded
from qstar_jax.console import say
from qstar_jax.plan.plan import Plan
from qstar_jax.report.tables import Table, print_table

GIB = 2**30


def run(config: PlanConfig):
    """Compiles a run's program for hardware that is not there, prints what it needs, and writes plan.json."""
    import jax

    from qstar_jax.plan.options import check_options, mesh_options, options_of
    from qstar_jax.plan.search import find_settings, find_slice
    from qstar_jax.store.files import write_json

    jax.config.update("jax_platforms", "cpu")  # compilers of other hardware would look for it
    console, changes = Console(), []
    if warning := check_options(config):
        say(console, warning)

    def report(change: str, plan: Plan):
        say(console, f"{plan.topology}, {change}: {verdict(plan)}")

    with console.status("planning; a program takes seconds to minutes to compile"):
        if config.topology is None:
            plan = find_slice(config, report)
        else:
            changes, config, plan = find_settings(config, config.topology, report)
    for table in tables(config, plan):
        print_table(table, console)
    if plan.estimate:
        say(console, "estimated from shapes: programs cannot be compiled for this GPU")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    config = replace(config, mesh=mesh_options(config))
    options = {name: value for name, value in recorded(config).items() if name in options_of(config)}
    write_json(out / "plan.json", {"changes": changes, **plan.to_json(), "config": options})
    say(console, f"{out / 'plan.json'}")


def verdict(plan: Plan) -> str:
    """Says whether a plan fits, and what it needs if it does not."""
    limit = f"{plan.memory_limit / GIB:.1f} GiB"
    if plan.fits:
        return f"fits, {plan.needs.memory['total'] / GIB:.1f} of {limit}"
    if plan.refusal is None:
        return f"does not fit, {plan.needs.memory['total'] / GIB:.1f} of {limit}"
    return f"does not fit {limit}: {plan.refusal.partition(': ')[2] or plan.refusal}"


def tables(config: PlanConfig, plan: Plan) -> list[Table]:
    """Lays out a plan: what a device holds and computes, and what it sends, if it sends anything."""
    needs, is_search, limit = plan.needs, config.verb == "generate", f"{plan.memory_limit / GIB:.1f} GiB"
    what = f"Decoding ({config.decode.method}, {config.batch_size} prompts)" if is_search else "A step"
    devices = f"{plan.devices} devices, {limit} each" if plan.devices > 1 else f"1 device, {limit}"
    caption = f"{what} on {plan.topology}: {devices}"
    rows = [(f"memory: {name}", f"{size / GIB:.2f} GiB") for name, size in needs.memory.items()]
    rows += [(f"FLOPs: {name}", f"{flops:.3g}") for name, flops in needs.flops.items()]
    rows += [(f"seconds by {name}", f"{seconds:.3g}") for name, seconds in plan.seconds.items()]
    rows += [("binds", plan.binds)]
    rows += [] if is_search else [("expected MFU", f"{plan.expected_mfu:.2f}")]
    rows += [(f"{'new ' * is_search}tokens per second, all devices", f"{plan.tokens_per_second:,.0f}")]
    rows += [] if plan.estimate else [("seconds to compile", f"{plan.compile_seconds:.0f}")]
    transfers = [(kind, f"{x['count']:.0f}", f"{x['bytes'] / GIB:.2f}") for kind, x in needs.collectives.items()]
    of_transfers = Table("Transfers between devices", ("kind", "count", "GiB sent"), tuple(transfers))
    column = "per device, estimated" if plan.estimate else "per device"
    return [Table(caption, (column, "value"), tuple(rows)), *([of_transfers] if transfers else [])]
