"""The language model you train on preferences, read as the Q-function that it secretly is.

`__all__` is the public surface. Importing the package is quick: each name is loaded where it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> the module that has it. A module itself stands for its public functions.
_PUBLIC = {
    # Models, and what they say.
    "load": "api",
    "Model": "api",
    "Answers": "api",
    "Scores": "api",
    # Training.
    "dpo": "api",
    "rl": "api",
    "sft": "api",
    "Run": "api",
    # Research code: models of any library, their scores, losses, steps and searches.
    "FunctionModel": "models",
    "token_batch": "api",
    "TokenScores": "mdp",
    "score_tokens": "scoring",
    "make_loss": "losses",
    "preference_loss_fn": "training.objectives",
    "make_train_step": "training.step",
    "TrainState": "training.step",
    "mean_metrics": "training.metrics",
    "beam_search": "decoding.search.beam",
    "BeamOptions": "decoding.search.beam_options",
    "mcts": "decoding.search.mcts",
    "MctsOptions": "decoding.search.mcts_options",
    # Theory.
    "diffusion": None,
    "losses": None,
    "mdp": None,
    "shaping": None,
    "tabular": None,
    # Errors.
    "InputError": "errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # what editors and type checkers read
    from qstar_jax import diffusion as diffusion
    from qstar_jax import losses as losses
    from qstar_jax import mdp as mdp
    from qstar_jax import shaping as shaping
    from qstar_jax import tabular as tabular
    from qstar_jax.api import Answers as Answers
    from qstar_jax.api import Model as Model
    from qstar_jax.api import Run as Run
    from qstar_jax.api import Scores as Scores
    from qstar_jax.api import dpo as dpo
    from qstar_jax.api import load as load
    from qstar_jax.api import rl as rl
    from qstar_jax.api import sft as sft
    from qstar_jax.api import token_batch as token_batch
    from qstar_jax.decoding.search.beam import beam_search as beam_search
    from qstar_jax.decoding.search.beam_options import BeamOptions as BeamOptions
    from qstar_jax.decoding.search.mcts import mcts as mcts
    from qstar_jax.decoding.search.mcts_options import MctsOptions as MctsOptions
    from qstar_jax.errors import InputError as InputError
    from qstar_jax.losses import make_loss as make_loss
    from qstar_jax.mdp import TokenScores as TokenScores
    from qstar_jax.models import FunctionModel as FunctionModel
    from qstar_jax.scoring import score_tokens as score_tokens
    from qstar_jax.training.metrics import mean_metrics as mean_metrics
    from qstar_jax.training.objectives import preference_loss_fn as preference_loss_fn
    from qstar_jax.training.step import TrainState as TrainState
    from qstar_jax.training.step import make_train_step as make_train_step


def __getattr__(name: str) -> Any:
    """Loads a public name."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    if _PUBLIC[name] is None:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
