"""The one way from values to a page: every text is escaped and visible, and a value that is missing is an error.

Only the fields of a form hold text as it is, or it could not be sent again: `{{ text | e }}`.
"""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qstar_jax.console import visible


def render(template: str, **values: Any) -> str:
    """Fills a template of this package."""
    environment = Environment(
        loader=PackageLoader("qstar_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_show,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _show(value: Any) -> Any:
    """Shows what would act or hide in text; what is HTML already stays."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
