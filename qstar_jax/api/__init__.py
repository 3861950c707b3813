"""The library in a few lines of Python: load a model, let it answer, see its scores, train it."""

from qstar_jax.api.model import Model as Model
from qstar_jax.api.model import load as load
from qstar_jax.api.results import Answers as Answers
from qstar_jax.api.results import Scores as Scores
from qstar_jax.api.token_batch import token_batch as token_batch
from qstar_jax.api.training import Run as Run
from qstar_jax.api.training import dpo as dpo
from qstar_jax.api.training import rl as rl
from qstar_jax.api.training import sft as sft
