"""The verbs that train, and the blocks that only they have."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.compute import ComputeOptions, MeshOptions
from qstar_jax.config.data import DataOptions
from qstar_jax.config.loss import LossOptions, ReferenceOptions, WeightingOptions
from qstar_jax.config.optimizer import OptimizerOptions
from qstar_jax.config.ranges import SEEDS, ranged
from qstar_jax.config.variants import path


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (LoRA): only they are trained; the base is frozen and stored in `compute.param_dtype`.

    Args:
        rank: Rank of the adapters, which are float32; 0 trains all parameters.
        alpha: The adapter's product is scaled by alpha / rank; null: 2 * rank.
        targets: Linear layers with an adapter: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, in any
            family (without gate_proj if the MLP has no gate); or their names in the files of the model (c_attn,
            attn.c_proj, qkv_proj, query_key_value, ...), where a fused layer stands for all its parts. null: all.
    """

    rank: int = 0
    alpha: float | None = ranged(None, "(0, inf)")
    targets: list[str] | None = None


@dataclass(frozen=True)
class TrainOptions:
    """Steps, batch size and intervals.

    Args:
        steps: Optimizer steps; 0: as many as `epochs` take.
        epochs: Passes over the rows, instead of `steps`; null: one.
        batch_size: Rows of the file (pairs, for DPO) per step, over all devices, hosts and micro-batches.
        accumulate: Micro-batches per step, computed one after the other; the gradient is that of the whole batch.
        eval_batch_size: Rows per batch of an evaluation; 0: `batch_size`.
        seed: Seed of the order of the rows.
        log_every: Steps between lines of metrics; below 1: a share of all steps, here and in the next two.
        eval_every: Steps between evaluations; 0: only at the start and at the end.
        save_every: Steps between checkpoints; 0: only at the end.
        keep_checkpoints: Number of the newest checkpoints to keep.
        keep_best: Metric of held-out rows (`data.eval`) whose best checkpoint is kept too, and is what other verbs read
            from the run; null: they read the newest.
        patience: Stop after this many evaluations in a row that did not improve `keep_best`; 0: never.
        reference_samples: Responses sampled before step 0 from a reference that does not move. Their rewards are logged
            at each evaluation and tell an ordinary fall of rewards (of chosen, best or desirable responses, or of all
            those with returns) from a harmful one; 0: none. A resumed run keeps those it began with, or takes 0.
        show_responses: Respond to the prompts of this many held-out rows (of `data.train` if there are none) at each
            evaluation, taking the most likely tokens; responses.jsonl has the responses, the log the first of them.
        profile: FIRST:LAST, such as 10:13: leaves a trace of the steps FIRST to LAST - 1, counted from 0, in profile/,
            for `xprof --logdir OUT/profile`; null: none.
    """

    steps: int = 0
    epochs: float | None = None
    batch_size: int = ranged(32, "[1, 1e6]")
    accumulate: int = ranged(1, "[1, 1e6]")
    eval_batch_size: int = ranged(0, "[0, 1e6]")
    seed: int = ranged(0, SEEDS)
    log_every: int | float = 10
    eval_every: int | float = 0
    save_every: int | float = 0
    keep_checkpoints: int = ranged(2, "[1, inf)")
    keep_best: (
        Literal["loss", "rewards/margins", "rewards/accuracies", "objective/scores", "objective/rlhf_reward"] | None
    ) = None
    patience: int = 0
    reference_samples: int = 16
    show_responses: int = ranged(0, "[0, inf)")
    profile: str | None = None


@dataclass(frozen=True)
class LogOptions:
    """Where metrics go besides metrics.jsonl and TensorBoard's files: with all options and the final summary.

    Args:
        wandb: Project of Weights & Biases (extra `wandb`; WANDB_MODE=offline needs no account); a resumed run goes on
            there too. null: not sent.
        trackio: Project of trackio (extra `trackio`); the same.
    """

    wandb: str | None = None
    trackio: str | None = None


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on responses: the usual step before DPO.

    Args:
        model: Hugging Face folder, hub name, or folder of an earlier run.
        out: Folder of the run: config.yaml, metrics.jsonl, curves.png, checkpoints/, summary.json; with an adapter
            also base/.
        resume: Continue from the newest checkpoint in `out`, with the options and data that the run began with; without
            a checkpoint, begin at step 0. `auto` means the same: launchers may always pass it.
        export: Folder for the trained model in Hugging Face's format, once the run is complete (see `qstar export`);
            null: none.
    """

    model: str = path()
    out: str = path()
    resume: bool | Literal["auto"] = False
    export: str | None = path(None)
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    log: LogOptions = field(default_factory=LogOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class DpoConfig:
    """Training on preference pairs, by DPO unless another loss is named: log-ratios become a token-level reward.

    Args:
        model: Hugging Face folder, hub name, or folder of an earlier run; also the frozen reference, if the loss has
            one.
        out: Folder of the run: config.yaml, metrics.jsonl, curves.png, checkpoints/, summary.json; reference/, or with
            an adapter base/.
        resume: Continue from the newest checkpoint in `out`, with the options and data that the run began with; without
            a checkpoint, begin at step 0. `auto` means the same: launchers may always pass it.
        export: Folder for the trained model in Hugging Face's format, once the run is complete (see `qstar export`);
            null: none.
    """

    model: str = path()
    out: str = path()
    resume: bool | Literal["auto"] = False
    export: str | None = path(None)
    data: DataOptions = field(default_factory=DataOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    weighting: WeightingOptions = field(default_factory=WeightingOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    log: LogOptions = field(default_factory=LogOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
