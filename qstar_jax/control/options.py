"""Options of `qstar control`: those of the task filled in, and what has no meaning refused, before anything is made."""

from qstar_jax.config import ControlConfig
from qstar_jax.config.control import with_task_defaults
from qstar_jax.config.ranges import check_ranges
from qstar_jax.config.unread import check_unread
from qstar_jax.config.variants import check_variant
from qstar_jax.errors import InputError
from qstar_jax.training.optimizers import check_steps


def resolve(config: ControlConfig) -> ControlConfig:
    """Fills in what the task determines, and checks all options.

    Raises:
        InputError: If options are out of range, have no effect, or contradict each other.
    """
    check_ranges(config)
    check_variant(config.optimizer, "optimizer")
    check_steps("optimizer.warmup_steps", config.optimizer.warmup_steps)
    for name, values in {"arms": config.arms, "seeds": config.seeds}.items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"--{name} {values}: expected at least one, and each once")
    config = with_task_defaults(config)
    _check_effects(config, with_task_defaults(ControlConfig(config.task, config.out)))
    if config.task in ("lqr", "bin-picking-v3") and config.segments.discount == 1:
        raise InputError(f"segments.discount is {config.segments.discount}; expected a number in (0, 1)")
    if config.loss.pairs == "all" and config.segments.sampled:
        raise InputError(
            "loss.pairs all orders segments by their scores, so preferences cannot be drawn at random; set "
            "--segments.sampled false, or --loss.pairs given"
        )
    if config.loss.pairs == "all" and not 2 <= config.train.batch_size <= config.segments.count:
        raise InputError(
            f"train.batch_size is {config.train.batch_size}; expected 2 to segments.count, {config.segments.count}, "
            "where all segments of a batch are compared"
        )
    return config


def _check_effects(config: ControlConfig, unset: ControlConfig):
    """Refuses options that nothing reads; `unset` has the defaults of the task."""

    def unread(why: str, *names: str):
        check_unread(config, unset, names, why)

    if config.task == "lqr":
        unread("with --task lqr, whose policies are measured exactly; leave it out", "train.episodes")
    elif config.task != "bin-picking-v3":
        why = f"with --task {config.task}, a file, which has no environment to measure policies in; leave it out"
        unread(why, "train.success_every", "train.episodes")
    if not config.actor.hidden:
        unread(
            "with --actor.hidden [], a linear policy; give it widths, such as [256], or leave it out", "actor.dropout"
        )
    if config.actor.kind == "squashed":
        unread("with --actor.kind squashed, which learns its deviations; leave it out", "actor.std")
    if config.loss.pairs == "all":
        unread("with --loss.pairs all, which compares all segments of a batch; leave it out", "segments.pairs")
    if config.arms == ["without_bc"]:
        unread("without an arm that clones, such as with_bc; name one in --arms, or leave it out", "train.bc_steps")
    if config.arms == ["best_bc"]:  # beta, bias and discount measure it
        unread(
            "with --arms [best_bc], which learns from no preferences; name another arm too, or leave it out",
            *("loss.pairs", "segments.pairs", "train.steps", "train.eval_every", "train.success_every"),
        )
