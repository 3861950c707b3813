"""The help of options that only some variants read, generated from their declarations."""

from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter

from qstar_jax.config import VARIANT_BLOCKS
from qstar_jax.config.variants import declarations, select


class HelpFormatter(DefaultHelpFormatter):
    """Says of each such option who reads it and what its default is."""

    def _expand_help(self, action: Any) -> str:
        text = super()._expand_help(action)
        name, _, option = action.dest.partition(".")
        block = VARIANT_BLOCKS.get(name)
        declaration = declarations(block).get(option) if block else None
        if declaration is None or not declaration.defaults:
            return text
        text = text.rpartition("default: ")[0] + f"default: {shown_default(declaration.defaults)})"
        return f"{shown_readers(declaration.defaults, select(block)[1])}{text}"


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
