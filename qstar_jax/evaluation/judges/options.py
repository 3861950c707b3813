"""The `judge:` block, checked."""

from qstar_jax.config import JudgeOptions
from qstar_jax.config.variants import check_variant, fill_in
from qstar_jax.errors import InputError


def check_judge(options: JudgeOptions, *, true_reward: bool = False) -> JudgeOptions:
    """Refuses what has no meaning or would have no effect, before anything is loaded.

    Args:
        options: The block.
        true_reward: Whether the task knows the true reward of a response.

    Returns:
        The block, with the defaults of its kind filled in.

    Raises:
        InputError: If an option is refused; the message begins with "judge: ".
    """
    check_variant(options, "judge")
    if options.seed and options.both_orders:
        raise InputError(
            f"judge: seed {options.seed} has no effect with both_orders, as no order is drawn; leave one of them out"
        )
    if options.kind == "true_reward" and not true_reward:
        raise InputError(
            "judge: kind true_reward has a meaning only in a task that knows the true reward of a response, and this "
            "one does not; set --judge.kind reward_model or llm"
        )
    models = {
        "reward_model": "the folder of a DPO run, or folder or hub name of a classifier with one label",
        "llm": "the name of the model at its server",
    }
    if options.kind in models and not options.model:
        raise InputError(f"judge: kind {options.kind} needs --judge.model: {models[options.kind]}")
    return fill_in(options)
