"""Optimizers by name, after global-norm clipping, with a warm-up and a schedule."""

import math

import jax
import optax

from qstar_jax.config import OptimizerOptions
from qstar_jax.config.variants import check_variant, fill_in
from qstar_jax.errors import InputError
from qstar_jax.models.causal_lm import Params


def count_steps(option: float, steps: int) -> int:
    """The value of an option in steps or, below 1, in shares of all `steps`; rounded up, as TRL does."""
    return math.ceil(option * steps - 1e-6) if option < 1 else int(option)


def check_steps(name: str, value: float):
    """Refuses a value of such an option that is neither: negative, or with a fraction above 1.

    Raises:
        InputError: If it is; it gives `name`, the option.
    """
    if value < 0 or value != int(value) > 0:
        raise InputError(f"{name} {value}: expected a number of steps, or a share of all steps below 1")


def learning_rate_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Makes the schedule: linear warm-up, then the chosen schedule down to 0 at the end of the run."""
    peak, warmup = options.learning_rate, count_steps(options.warmup_steps, steps)
    after = max(steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, after),
        "cosine": optax.cosine_decay_schedule(peak, after),
    }[options.schedule]
    # The first of W warm-up steps already has rate peak / W: a step at rate 0 would be wasted.
    return optax.join_schedules(
        [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)), decay], [warmup]
    )


def make_optimizer(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer, after global-norm clipping; weight decay is always decoupled.

    Options that are not given take the optimizer's default.

    Raises:
        InputError: If an option is given that the optimizer does not read, or out of range.
    """
    check_variant(options, "optimizer")
    options = fill_in(options)
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm) if options.max_grad_norm else optax.identity(),
        _scale_gradients(options),
        optax.add_decayed_weights(options.weight_decay, _is_matrix) if options.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate_schedule(options, steps)),
    )


def _scale_gradients(options: OptimizerOptions) -> optax.GradientTransformation:
    match options.name:
        case "adamw":
            return optax.scale_by_adam(options.beta1, options.beta2, options.eps)
        case "lion":
            return optax.scale_by_lion(options.beta1, options.beta2)
        case "rmsprop":
            return optax.scale_by_rms(options.decay, options.eps, eps_in_sqrt=False)
    return optax.chain(optax.scale_by_factored_rms(decay_rate=options.decay), optax.clip_by_block_rms(1.0))


def _is_matrix(params: Params):
    """Selects the parameters that decay: all but norms and biases, which are matrices too in a stack of layers."""

    def is_matrix(path, _) -> bool:
        *parents, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return name != "bias" and not any("norm" in parent for parent in parents)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
