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
    if options.kind == "reward_model" and not options.model:
        raise InputError(
            "judge: kind reward_model needs --judge.model: the folder of a DPO run, or folder or hub name of a "
            "classifier with one label"
        )
    if options.kind == "llm" and not options.model:
        raise InputError("judge: kind llm needs --judge.model: the name of the model at its server")
    return fill_in(options)
