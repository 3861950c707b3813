"""The layout of the package, read off its imports: one folder is one floor, and every arrow points down."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import qstar_jax

PACKAGE = Path(qstar_jax.__file__).parent
# From the ground up. A room imports from rooms before it in this list, never from one behind it.
FLOORS = (
    *("_compat", "errors", "interruption", "console", "untrusted", "config"),  # what every room may use
    *("shapes", "mdp", "shaping", "losses", "tabular", "diffusion"),  # arrays in, arrays out
    *("sharding", "models"),
    *("tasks", "data"),
    *("store", "scoring"),
    *("decoding", "training", "control", "pipeline"),
    *("evaluation", "report", "plan"),
    *("api", "demo", "cli"),
)


def module_of(path: Path) -> str:
    """`losses/pairwise.py` is `losses.pairwise`, a package its folder, and the package itself ''."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Modules of the package that a module imports, those imported inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name == "qstar_jax" or name.startswith("qstar_jax."):
                inside = name.removeprefix("qstar_jax").removeprefix(".")
                yield inside if inside in MODULES else inside.rpartition(".")[0]


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} - {""} == set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_a_room_imports_only_what_is_below_it(floor):
    below = FLOORS[: FLOORS.index(floor) + 1]
    climbs = [
        f"{module} imports {other}"
        for module in MODULES
        if room(module) == floor
        for other in imports(module)
        if other and room(other) not in below
    ]
    assert not climbs


def test_no_module_imports_itself_through_others():
    # A package stands for the modules that its __init__ names; these do not import the package.
    graph = {module: set(imports(module)) - {"", module} for module in MODULES}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle
