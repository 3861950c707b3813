"""Language models as pure functions of their parameters, one file per family."""

from qstar_jax.models.causal_lm import FAMILIES as FAMILIES
from qstar_jax.models.causal_lm import CausalLM as CausalLM
from qstar_jax.models.causal_lm import DecodeCache as DecodeCache
from qstar_jax.models.function import FunctionModel as FunctionModel

LanguageModel = CausalLM | FunctionModel  # what scores and losses take
