"""The help of options that only some variants read, generated from their declarations."""

import ast
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter

from qstar_jax.config import VARIANT_BLOCKS
from qstar_jax.config.variants import declarations, variants_of


class HelpFormatter(DefaultHelpFormatter):
    """Says of each such option who reads it and what its default is."""

    def _expand_help(self, action: Any) -> str:
        text = super()._expand_help(action)
        block, _, option = action.dest.partition(".")
        defaults, variants = _defaults(block)
        if not defaults.get(option):
            return text
        text = text.rpartition("default: ")[0] + f"default: {shown_default(defaults[option])})"
        return f"{shown_readers(defaults[option], variants)}{text}"


def _defaults(block: str) -> tuple[Mapping[str, Mapping[str, Any]], Sequence[str]]:
    """Option -> variant -> default, and the variants of a block; empty for blocks without variants."""
    if block == "loss":
        defaults = loss_defaults()
        return defaults, list(dict.fromkeys(loss for readers in defaults.values() for loss in readers))
    if block not in VARIANT_BLOCKS:
        return {}, ()
    declared = declarations(VARIANT_BLOCKS[block])
    return {name: declaration.defaults for name, declaration in declared.items()}, variants_of(VARIANT_BLOCKS[block])[1]


@cache
def loss_defaults() -> dict[str, dict[str, Any]]:
    """Option -> loss -> default, read from the source of the losses: importing them would import JAX."""
    defaults: dict[str, dict[str, Any]] = {}
    folder = Path(__file__).parents[1] / "losses"
    catalog = ast.walk(ast.parse((folder / "catalog.py").read_text(encoding="utf-8")))
    listed = {node.attr for node in catalog if isinstance(node, ast.Attribute)}  # pairwise.sigmoid and others
    for path in sorted(folder.glob("*.py")):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef) and function.name in listed:
                for option, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
                    value = default.id if isinstance(default, ast.Name) else ast.literal_eval(default)
                    defaults.setdefault(option.arg, {})[function.name] = value
    return defaults


def shown_readers(defaults: Mapping[str, Any], variants: Sequence[str]) -> str:
    """Names who reads an option: "[beam, chunk] ", "[all but exact] ", or nothing where all do."""
    others = [variant for variant in variants if variant not in defaults]
    if not others:
        return ""
    return f"[all but {', '.join(others)}] " if len(others) < len(defaults) else f"[{', '.join(defaults)}] "


def shown_default(defaults: Mapping[str, Any]) -> str:
    """Shows the default of most variants and the exceptions: "0.999; lion: 0.99"."""
    values = list(defaults.values())
    common = max(values, key=values.count)
    exceptions = [f"{variant}: {_shown(value)}" for variant, value in defaults.items() if value != common]
    return "; ".join([_shown(common), *exceptions])


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
