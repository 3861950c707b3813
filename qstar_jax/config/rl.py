"""The verb that trains on a reward, and the blocks that only it has."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.compute import ComputeOptions, MeshOptions
from qstar_jax.config.data import DataOptions
from qstar_jax.config.optimizer import OptimizerOptions
from qstar_jax.config.train import LogOptions, LoraOptions, TrainOptions
from qstar_jax.config.variants import option, path, selector


@dataclass(frozen=True)
class RlOptions:
    """How a policy learns from rewards of its own samples. Brackets name the algorithm that reads an option.

    Args:
        algorithm: `rloo` is REINFORCE, with the other samples of a prompt as baseline; `ppo` makes several steps with
            the same samples, and clips the ratio of probabilities (without a value network: its baseline is the same).
        samples_per_prompt: Responses drawn for each prompt, at least 2.
        kl_coef: Reward that a nat of log pi / pi_ref costs, token by token; it is the beta of the run's implicit
            rewards. 0: no reference.
        credit: What a token is credited with: the rewards from it on (`token`), or all of its response (`sequence`).
        normalize_advantages: Divide the advantages of a step by their standard deviation.
        temperature: Divides the policy's logits; the policy so changed is sampled, trained, and compared with a
            reference changed likewise. Other verbs read the run at temperature 1.
        max_new_tokens: Longest response, EOS included.
        missing_eos_penalty: Subtracted from the score of a response that reached the limit; null: nothing.
        clip_ratio: Ratios beyond 1 - clip_ratio and 1 + clip_ratio earn nothing more.
        inner_epochs: Passes over the samples of a step.
        minibatches: Optimizer updates per pass.
    """

    algorithm: Literal["rloo", "ppo"] = selector("rloo")
    samples_per_prompt: int = 4
    kl_coef: float = 0.05
    credit: Literal["token", "sequence"] = "token"
    normalize_advantages: bool = False
    temperature: float = 1.0
    max_new_tokens: int = 64
    missing_eos_penalty: float | None = None
    clip_ratio: float | None = option(["ppo"], 0.2, bounds="(0, 1)")
    inner_epochs: int | None = option(["ppo"], 4, bounds="[1, inf)")
    minibatches: int | None = option(["ppo"], 1, bounds="[1, inf)")


@dataclass(frozen=True)
class RewardOptions:
    """What responses earn: a score at their last token, rewards of each token, or both. Brackets name the kinds.

    Scores are of the prompt as its file has it, without the policy's chat template, and of the response as text.

    Args:
        kind: What gives the score: `true_reward`, the built-in task whose prompts are read; `reward_model`, a DPO run
            or a classifier; `verifier`, 1 if the final answer is that of the row and 0 if not; `function`, a
            function of yours (`qstar_jax.rl` in Python); `none`, no score.
        weight: Multiplies the score; 0 only measures it.
        model: Folder of a DPO run, whose implicit reward is summed over the response, or folder or hub name of a
            classifier with one label.
        reference: Folder or hub name of the reference of a language model; a DPO run brings its own.
        beta: Temperature of the rewards of a language model: reward per nat; a DPO run brings its own.
        as_chat: Wrap prompt and response as messages and apply the reward model's chat template.
        max_length: Longest prompt and response together, in tokens of the reward model.
        max_prompt_length: Longest prompt, in tokens of the reward model.
        batch_size: Responses that the reward model scores at once.
        answer: Column of the right answer.
        extract: What a response's final answer is: `marked`, `hash`, `boxed`, `number` or `pattern` (see
            `qstar select`).
        pattern: Regular expression with one group around the final answer, such as "A: (.+)"; its last match counts.
        guide: Folder of a DPO run whose token rewards are added (RTO, arXiv 2404.18922); its model has the same
            tokens.
        guide_weight: Multiplies the token rewards.
        guide_clip: The weighted token rewards are clipped to this magnitude; null: they are not.
    """

    kind: Literal["true_reward", "reward_model", "verifier", "function", "none"] = selector("true_reward")
    weight: float | None = option(["true_reward", "reward_model", "verifier", "function"], 1.0, bounds="[0, inf)")
    model: str | None = option(["reward_model"], path=True)
    reference: str | None = option(["reward_model"], path=True)
    beta: float | None = option(["reward_model"])
    as_chat: bool | None = option(["reward_model"], False)
    max_length: int | None = option(["reward_model"], 1024, bounds="[2, inf)")
    max_prompt_length: int | None = option(["reward_model"], 512, bounds="[1, inf)")
    batch_size: int | None = option(["reward_model"], 16, bounds="[1, inf)")
    answer: str | None = option(["verifier"], "answer")
    extract: str | None = option(["verifier"], "marked")
    pattern: str | None = option(["verifier"])
    guide: str | None = path(None)
    guide_weight: float = 1.0
    guide_clip: float | None = None


@dataclass(frozen=True)
class RlConfig:
    """Training on a reward: the policy answers prompts, and learns from what its own responses earn.

    Args:
        model: Hugging Face folder, hub name, or folder of an earlier run; also the frozen reference.
        out: Folder of the run: config.yaml, metrics.jsonl, curves.png, checkpoints/, summary.json; reference/, or with
            an adapter base/.
        resume: Continue from the newest checkpoint in `out`, with the options and data that the run began with; without
            a checkpoint, begin at step 0. `auto` means the same: launchers may always pass it.
        export: Folder for the trained model in Hugging Face's format, once the run is complete (see `qstar export`);
            null: none.
        data: Prompts, in any file with a prompt column; of what else its rows hold, a verifier reads `reward.answer`.
        train: A row is a prompt: `train.batch_size` counts prompts.
    """

    model: str = path()
    out: str = path()
    resume: bool | Literal["auto"] = False
    export: str | None = path(None)
    data: DataOptions = field(default_factory=lambda: DataOptions(layout="shared"))
    rl: RlOptions = field(default_factory=RlOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=lambda: TrainOptions(reference_samples=0))
    log: LogOptions = field(default_factory=LogOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
