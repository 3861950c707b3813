"""The `optimizer:` block."""

from dataclasses import dataclass
from typing import Literal

from qstar_jax.config.ranges import ranged
from qstar_jax.config.variants import option, selector


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer, after global-norm clipping. Brackets name the optimizers that read an option; others refuse it.

    Args:
        name: adamw, lion, adafactor, or rmsprop (the paper's code base).
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up; below 1: a share of all steps.
        schedule: Schedule after the warm-up.
        weight_decay: Decoupled weight decay of matrices; norms and biases do not decay.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        decay: Decay of the squared gradients; for adafactor, the exponent of its schedule.
        max_grad_norm: Gradients are scaled down to this global norm; 0: no clipping.
    """

    name: Literal["adamw", "lion", "adafactor", "rmsprop"] = selector("adamw")
    learning_rate: float = ranged(1e-6, "[0, inf)")
    warmup_steps: int | float = ranged(0, "[0, inf)")
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    weight_decay: float = ranged(0.0, "[0, inf)")
    beta1: float | None = option({"adamw": 0.9, "lion": 0.9}, bounds="[0, 1)")
    beta2: float | None = option({"adamw": 0.999, "lion": 0.99}, bounds="[0, 1)")
    eps: float | None = option({"adamw": 1e-8, "rmsprop": 1e-8}, bounds="[0, inf)")
    decay: float | None = option({"rmsprop": 0.99, "adafactor": 0.8}, bounds="[0, 1]")  # rmsprop: torch's
    max_grad_norm: float = ranged(1.0, "[0, inf)")
