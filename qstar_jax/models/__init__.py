"""Language models as pure functions of their parameters; one file a family."""

from qstar_jax.models.causal_lm import FAMILIES as FAMILIES
from qstar_jax.models.causal_lm import CausalLM as CausalLM
from qstar_jax.models.causal_lm import DecodeCache as DecodeCache
