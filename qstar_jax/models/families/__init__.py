"""Families of decoders, one short file each: a `FAMILY` that says how Hugging Face stores its models.

To add one, add a file; the network, reader, writer and adapters need to know nothing of it.
"""

import pkgutil
from importlib import import_module

from qstar_jax.models.family import Family

# model_type of config.json -> the family
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (import_module(f"{__name__}.{found.name}").FAMILY for found in pkgutil.iter_modules(__path__))
}
