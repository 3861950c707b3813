"""A judge out of the `judge:` block."""

from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import ComputeOptions, DataOptions, JudgeOptions, MeshOptions
from qstar_jax.evaluation.judges.base import Judge
from qstar_jax.evaluation.judges.chat import ChatServer
from qstar_jax.evaluation.judges.cost import Budget
from qstar_jax.evaluation.judges.llm import LlmJudge
from qstar_jax.evaluation.judges.options import check_judge
from qstar_jax.evaluation.judges.prompts import load_template
from qstar_jax.evaluation.judges.reward_model import load_reward
from qstar_jax.evaluation.judges.rewards import Reward, RewardJudge
from qstar_jax.sharding import make_mesh
from qstar_jax.store.user_cache import user_cache


def make_judge(
    options: JudgeOptions,
    *,
    true_reward: Reward | None = None,
    compute: ComputeOptions = ComputeOptions(),
    mesh: Mesh | None = None,
    mesh_options: MeshOptions = MeshOptions(),
    console: Console | None = None,
) -> Judge:
    """Makes a judge.

    Args:
        options: The block.
        true_reward: The task's reward of (prompt, response) pairs, where it is known.
        compute: Dtypes of a reward model.
        mesh: Its devices; by default those that `mesh_options` arrange.
        mesh_options: How its parameters are sharded.
        console: Where to show progress, estimates of cost, and counts of truncated and undecided texts; None: nowhere.

    Returns:
        The judge; one of kind llm has also `estimate(comparisons)`.

    Raises:
        InputError: If an option has no effect with this kind, is missing or out of range, or names what cannot be used.
    """
    options = check_judge(options, true_reward=true_reward is not None)
    if options.kind == "llm":
        return _llm(options, console)
    if options.kind == "true_reward":
        return RewardJudge("true reward", true_reward, options.tolerance)
    reward = load_reward(
        options.model,
        mesh=make_mesh(mesh_options) if mesh is None else mesh,
        reference=options.reference,
        beta=options.beta,
        data=DataOptions(
            as_chat=options.as_chat, max_length=options.max_length, max_prompt_length=options.max_prompt_length
        ),
        batch_size=options.batch_size,
        compute=compute,
        mesh_options=mesh_options,
        console=console,
    )
    return RewardJudge(f"reward model {Path(options.model).name}", reward, options.tolerance)


def _llm(options: JudgeOptions, console: Console | None) -> LlmJudge:
    template = load_template(options.prompt)
    budget = Budget(options.price_in, options.price_out, options.max_cost)
    names = ("model", "base_url", "temperature", "max_tokens", "http_retries", "timeout")
    server = ChatServer(**{name: getattr(options, name) for name in names})
    return LlmJudge(
        server,
        template,
        cache=user_cache("judge") if options.cache is None else Path(options.cache).expanduser(),
        seed=options.seed,
        both_orders=options.both_orders,
        retries=options.retries,
        concurrency=options.concurrency,
        budget=budget,
        console=console,
    )
