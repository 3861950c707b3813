"""Optimizers by name, behind global-norm clipping, with a warm-up and a schedule."""

import jax
import optax

from qstar_jax.config import OptimizerOptions
from qstar_jax.errors import InputError
from qstar_jax.models.causal_lm import Params

# Options that an optimizer has beyond those of all, and their defaults.
_DEFAULTS: dict[str, dict[str, float]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "rmsprop": {"decay": 0.99, "eps": 1e-8},  # torch's, which the paper's code base takes
    "adafactor": {"decay": 0.8},
}


def learning_rate_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Linear warm-up, then the chosen schedule down to 0 at the end of the run.

    Args:
        options: Peak rate, warm-up and kind.
        steps: Length of the run.

    Returns:
        Rate as a function of the number of steps done.
    """
    peak, warmup = options.learning_rate, options.warmup_steps
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
    """Builds the optimizer behind global-norm clipping; weight decay is decoupled in all of them.

    Args:
        options: Its name and options; those that are not set take the optimizer's own default.
        steps: Length of the run, for the schedule.

    Returns:
        The optax transformation.

    Raises:
        InputError: If an option is set that the optimizer does not have.
    """
    own = _own_options(options)
    scale = {
        "adamw": lambda beta1, beta2, eps: optax.scale_by_adam(beta1, beta2, eps),
        "lion": lambda beta1, beta2: optax.scale_by_lion(beta1, beta2),
        "rmsprop": lambda decay, eps: optax.scale_by_rms(decay, eps, eps_in_sqrt=False),
        "adafactor": lambda decay: optax.chain(
            optax.scale_by_factored_rms(decay_rate=decay), optax.clip_by_block_rms(1.0)
        ),
    }[options.name](**own)
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm) if options.max_grad_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(options.weight_decay, _is_matrix) if options.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate_schedule(options, steps)),
    )


def _own_options(options: OptimizerOptions) -> dict[str, float]:
    known = _DEFAULTS[options.name]
    given = {name: getattr(options, name) for name in ("beta1", "beta2", "eps", "decay")}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - known.keys():
        takers = ", ".join(optimizer for optimizer, defaults in _DEFAULTS.items() if name in defaults)
        raise InputError(f"optimizer {options.name} has no {name} (it belongs to {takers}); it has {', '.join(known)}")
    return known | given


def _is_matrix(params: Params):
    """Which parameters decay: all but norms and biases, which a stack of layers gives two dimensions as well."""

    def is_matrix(path, _) -> bool:
        *parents, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return name != "bias" and not any("norm" in parent for parent in parents)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
