"""Model families, one short file each, whose `FAMILY` describes how Hugging Face stores its models.

To add a family, add a file; the network, the reader, the writer and the adapters need no change.
"""

import pkgutil
from importlib import import_module

from qstar_jax.models.family import Family

# model_type of config.json -> the family
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (import_module(f"{__name__}.{module.name}").FAMILY for module in pkgutil.iter_modules(__path__))
}
