"""The one way from values to a page: every text is escaped, and a value that is missing is an error."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Fills a template of this package."""
    environment = Environment(
        loader=PackageLoader("qstar_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
