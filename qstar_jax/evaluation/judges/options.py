"""The `judge:` block: which kind reads which of its options."""

from dataclasses import fields
from typing import get_args, get_type_hints

from qstar_jax.config import JudgeOptions
from qstar_jax.errors import InputError

KINDS = get_args(get_type_hints(JudgeOptions)["kind"])
_BY_REWARD = ("true_reward", "reward_model")
_LLM = (
    *("base_url", "prompt", "seed", "both_orders", "retries", "temperature", "max_tokens", "concurrency"),
    *("http_retries", "timeout", "cache", "price_in", "price_out", "max_cost"),
)

# Option -> the kinds that read it, first the one to choose for its sake.
READERS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "model": ("reward_model", "llm"),
    "tolerance": _BY_REWARD,
    **dict.fromkeys(
        ("reference", "beta", "as_chat", "max_length", "max_prompt_length", "batch_size"), ("reward_model",)
    ),
    **dict.fromkeys(_LLM, ("llm",)),
}

_LEAST = {"tolerance": 0, "batch_size": 1, "retries": 0, "max_tokens": 1, "concurrency": 1, "http_retries": 0}
_LEAST |= {"temperature": 0, "max_prompt_length": 1, "max_length": 2}


def check_judge(options: JudgeOptions, *, true_reward: bool = False):
    """Refuses what has no meaning or would have no effect, before anything is loaded.

    Args:
        options: The block.
        true_reward: Whether the task knows the true reward of an answer.

    Raises:
        InputError: If something is wrong; it begins with "judge: ".
    """
    wrong = _not_read(options) or _out_of_range(options) or _missing(options, true_reward)
    if wrong:
        raise InputError(f"judge: {wrong}")


def _not_read(options: JudgeOptions) -> str | None:
    for option in fields(options):
        value, readers = getattr(options, option.name), READERS[option.name]
        if value != option.default and options.kind not in readers:
            return (
                f"{option.name} {value!r} has no effect with kind {options.kind}; {' and '.join(readers)} "
                f"{'reads' if len(readers) == 1 else 'read'} it: set --judge.kind {readers[0]}, or leave it out"
            )
    if options.seed and options.both_orders:
        return f"seed {options.seed} has no effect with both_orders, as no order is drawn; leave one of them out"
    return None


def _out_of_range(options: JudgeOptions) -> str | None:
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and not value >= least:
            return f"{name} {value}: expected at least {least}"
    if not options.timeout > 0:
        return f"timeout {options.timeout}: expected seconds above 0"
    return None


def _missing(options: JudgeOptions, true_reward: bool) -> str | None:
    if options.kind == "true_reward" and not true_reward:
        return (
            "kind true_reward has a meaning only in a task that knows the true reward of an answer, and this one does "
            "not; set --judge.kind reward_model or llm"
        )
    if options.kind == "reward_model" and not options.model:
        return (
            "kind reward_model needs --judge.model: the folder of a DPO run, or folder or hub name of a classifier "
            "with one label"
        )
    if options.kind == "llm" and not options.model:
        return "kind llm needs --judge.model: the name of the model at its server"
    return None
