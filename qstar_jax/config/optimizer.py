"""The `optimizer:` block."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer, behind global-norm clipping. Options that are not set take the optimizer's own default.

    Args:
        name: adamw, lion, adafactor, or rmsprop (the paper's code base).
        learning_rate: Peak rate.
        warmup_steps: Steps of linear warm-up.
        schedule: What follows the warm-up.
        weight_decay: Decoupled decay of matrices: of neither norms nor biases.
        beta1: adamw, lion: decay of the first moment (0.9).
        beta2: adamw, lion: decay of the second moment (0.999; lion 0.99).
        eps: adamw, rmsprop: added to the denominator (1e-8).
        decay: rmsprop: decay of the squares (0.99); adafactor: exponent of its decay (0.8).
        max_grad_norm: Gradients are scaled down to this global norm; 0 switches clipping off.
    """

    name: Literal["adamw", "lion", "adafactor", "rmsprop"] = "adamw"
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    weight_decay: float = 0.0
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    decay: float | None = None
    max_grad_norm: float = 1.0
