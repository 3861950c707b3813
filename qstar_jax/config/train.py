"""The verbs that train, and the blocks that only they have."""

from dataclasses import dataclass, field

from qstar_jax.config.compute import ComputeOptions, MeshOptions
from qstar_jax.config.data import DataOptions
from qstar_jax.config.loss import LossOptions, ReferenceOptions
from qstar_jax.config.optimizer import OptimizerOptions
from qstar_jax.config.variants import path


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (LoRA): only they are trained, and the base is stored in `compute.param_dtype`, frozen.

    Args:
        rank: Rank of the adapters, which are float32; 0 trains all parameters.
        alpha: The adapter's product is scaled by alpha / rank; not set: 2 * rank.
        targets: Linear layers that have one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, in any
            family (without gate_proj where the MLP has no gate); or as the files of the model call them (c_attn,
            attn.c_proj, qkv_proj, query_key_value, ...), where a fused layer stands for all its parts. Not set: all.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] | None = None


@dataclass(frozen=True)
class TrainOptions:
    """The length and rhythm of a run.

    Args:
        steps: Optimizer steps; 0 goes once through the training rows.
        batch_size: Rows of the file (pairs, for DPO) a step, over all devices, hosts and micro-batches.
        accumulate: Micro-batches into which a step's rows are cut, to be computed one after the other; the gradient is
            that of the whole batch.
        eval_batch_size: The same for evaluation; 0 takes `batch_size`.
        seed: Fixes the order of the rows.
        log_every: Steps between lines of metrics.
        eval_every: Steps between evaluations; 0 evaluates at the start and at the end only.
        save_every: Steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: How many of the newest checkpoints are kept.
        reference_samples: Losses with a reference that does not move: answers drawn from the reference before step 0,
            whose rewards are logged at each evaluation and tell an ordinary fall of chosen rewards from a bad one; 0
            for none. A run that goes on keeps those it began with, or takes 0.
    """

    steps: int = 0
    batch_size: int = 32
    accumulate: int = 1
    eval_batch_size: int = 0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    reference_samples: int = 16


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on answers: the usual step before DPO.

    Args:
        model: Hugging Face folder, hub name, or an earlier run's folder.
        out: Folder of the run: config.yaml, metrics.jsonl, curves.png, checkpoints/, summary.json; with an adapter
            also base/.
        resume: Go on from the newest checkpoint in `out`, with the options and data that the run began with; without
            one, begin at step 0.
    """

    model: str = path()
    out: str = path()
    resume: bool = False
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class DpoConfig:
    """Training on preference pairs, by DPO unless another loss is named: log-ratios become a token-level reward.

    Args:
        model: Hugging Face folder, hub name, or an earlier run's folder; also the frozen reference, if the loss has
            one.
        out: Folder of the run: config.yaml, metrics.jsonl, curves.png, checkpoints/, summary.json; reference/, or with
            an adapter base/.
        resume: Go on from the newest checkpoint in `out`, with the options and data that the run began with; without
            one, begin at step 0.
    """

    model: str = path()
    out: str = path()
    resume: bool = False
    data: DataOptions = field(default_factory=DataOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
