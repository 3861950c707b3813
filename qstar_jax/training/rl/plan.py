"""The plan of a run on a reward: its options, resolved and checked before anything is loaded."""

from dataclasses import replace

from qstar_jax.config import ReferenceOptions, RlConfig, RlOptions
from qstar_jax.config.paths import check_paths
from qstar_jax.config.ranges import check_ranges
from qstar_jax.config.variants import check_variant, fill_in
from qstar_jax.errors import InputError
from qstar_jax.training.objectives import policy_gradient_objective
from qstar_jax.training.plan import RunPlan, check_train
from qstar_jax.training.reference import resolve_reference

METRICS = ("objective/scores", "objective/rlhf_reward")  # what `train.keep_best` may name


def make_rl_plan(config: RlConfig) -> RunPlan:
    """Resolves a run's options, and chooses its objective.

    Raises:
        InputError: If options are missing, out of range, or have no effect.
    """
    check_paths(config)
    check_ranges(config)
    if not config.data.train:
        raise InputError("--data.train is missing: name a file with a prompt column, or a dataset of the hub")
    check_train(config, METRICS)
    check_variant(config.rl, "rl")
    check_variant(config.reward, "reward")
    config = replace(config, rl=fill_in(config.rl), reward=fill_in(config.reward))
    _check_rl(config.rl)
    _check_reward(config)
    _check_shapes(config)
    reward = config.reward
    objective = policy_gradient_objective(config.rl, reward.weight, has_guide=reward.guide is not None)
    reference = resolve_reference(ReferenceOptions(), objective, config.lora.rank)
    return RunPlan("rl", config, objective, reference)


def updates_per_step(options: RlOptions) -> int:
    """Returns the optimizer updates of a step."""
    return (options.inner_epochs or 1) * (options.minibatches or 1)


def _check_rl(options: RlOptions):
    if options.samples_per_prompt < 2:
        raise InputError(
            f"rl.samples_per_prompt {options.samples_per_prompt}: expected at least 2, as the baseline of a sample is "
            "what the other samples of its prompt earn"
        )
    if options.kl_coef < 0 or not options.temperature > 0 or options.max_new_tokens < 1:
        raise InputError(
            f"rl.kl_coef {options.kl_coef:g} must be at least 0, rl.temperature {options.temperature:g} above 0, and "
            f"rl.max_new_tokens {options.max_new_tokens} at least 1"
        )


def _check_reward(config: RlConfig):
    reward = config.reward
    if reward.kind == "reward_model" and reward.model is None:
        raise InputError(
            "reward.kind reward_model needs --reward.model: the folder of a DPO run, or folder or hub name of a "
            "classifier with one label"
        )
    if reward.kind == "none" and reward.guide is None:
        raise InputError(
            "reward.kind none gives no reward; set --reward.guide to the folder of a DPO run for its token rewards, or "
            "choose true_reward, reward_model or verifier"
        )
    if reward.guide is None and (reward.guide_weight != 1 or reward.guide_clip is not None):
        raise InputError("reward.guide_weight and reward.guide_clip have no effect without reward.guide; set it")
    if reward.guide_clip is not None and reward.guide_clip <= 0:
        raise InputError(f"reward.guide_clip {reward.guide_clip:g} must be above 0")
    if config.train.reference_samples:
        raise InputError(
            f"train.reference_samples {config.train.reference_samples} has no effect: no responses are labelled whose "
            "rewards could fall; set it to 0"
        )


def _check_shapes(config: RlConfig):
    if config.data.layout == "packed":
        raise InputError(
            "data.layout packed has other shapes for other samples, so steps would be compiled anew; choose shared "
            "(samples share their prompt) or plain"
        )
    if config.data.row_length:
        raise InputError(f"data.row_length {config.data.row_length} has no effect without data.layout packed")
    size, updates = config.train.batch_size, (config.rl.minibatches or 1) * config.train.accumulate
    if size < 1 or config.train.accumulate < 1 or size % updates:
        raise InputError(
            f"train.batch_size {size} (prompts) does not divide evenly into {updates} parts (rl.minibatches times "
            f"train.accumulate); choose a multiple of {updates}"
        )
