"""The verb that trains policies over continuous actions, and its blocks."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qstar_jax.config.optimizer import OptimizerOptions
from qstar_jax.config.ranges import SEEDS, ranged
from qstar_jax.config.variants import path

Arm = Literal["with_bc", "without_bc", "with_bc_kl", "best_bc"]


@dataclass(frozen=True)
class ActorOptions:
    """The policy.

    Args:
        kind: `deterministic`: a tanh of which the mean acts, with constant variance; `gaussian`: with one learned
            covariance; `squashed`: tanh of a Gaussian, for actions in [-1, 1] (those of lqr are not). null: gaussian
            for lqr, else deterministic.
        hidden: Widths of the hidden layers; [] is linear. null: [] for lqr, else [256, 256].
        std: Standard deviation of `deterministic`, the initial one of `gaussian`. The default makes log pi = -pi |a -
            mean|^2, without a constant.
        dropout: Share of the hidden units left out in training; log-probabilities are measured without. null: 0 for
            lqr, else 0.25.
    """

    kind: Literal["deterministic", "gaussian", "squashed"] | None = None
    hidden: list[int] | None = ranged(None, "[1, inf)")
    std: float = ranged(0.39894228, "(0, inf)")
    dropout: float | None = ranged(None, "[0, 1)")


@dataclass(frozen=True)
class SegmentOptions:
    """Segments of behaviour and the preferences between them.

    Args:
        length: Steps of a segment. null: 8 for lqr, else 64.
        count: Number of training segments.
        pairs: Number of training pairs (`loss.pairs given`).
        held_out: Share of the episodes that is held out.
        eval_segments: Number of held-out segments, which are compared in disjoint pairs.
        label: `regret` compares sums of rewards with V at both ends, `reward` sums of rewards only.
        discount: Discount per step of rewards and V. null: 0.95 for lqr, else 0.99.
        sampled: Draw each preference with the probability sigma(difference); else the higher score is chosen. null:
            true for lqr, else false.
        seed: Seed of episodes, segments and preferences.
    """

    length: int | None = ranged(None, "[1, inf)")
    count: int = ranged(2500, "[1, inf)")
    pairs: int = ranged(10_000, "[1, inf)")
    held_out: float = ranged(0.1, "[0, 1)")
    eval_segments: int = ranged(200, "[1, inf)")
    label: Literal["regret", "reward"] = "regret"
    discount: float | None = ranged(None, "(0, 1]")
    sampled: bool | None = None
    seed: int = ranged(0, "[0, 9e18]")


@dataclass(frozen=True)
class CplOptions:
    """Contrastive preference learning.

    Args:
        pairs: `given` draws from the training pairs; `all` compares all segments of a batch by their scores.
        beta: alpha, the temperature of the advantage alpha log pi. null: 0.1 for lqr, else 0.0318, which is the paper's
            0.1 with its -|a - mean|^2 in place of log pi.
        bias: lambda in (0, 1], the weight of the rejected segment. null: 1 for lqr, else 0.5.
        discount: Discount per step of the advantages. null: 0.95 for lqr, else 1.
    """

    pairs: Literal["given", "all"] = "given"
    beta: float | None = ranged(None, "(0, inf)")
    bias: float | None = ranged(None, "(0, 1]")
    discount: float | None = ranged(None, "(0, 1]")


@dataclass(frozen=True)
class ControlTrainOptions:
    """Steps and intervals.

    Args:
        bc_steps: Steps of behaviour cloning. null: 6,000 for lqr, else 3,000.
        steps: Steps of preference learning. null: 8,000 for lqr, else 3,000.
        batch_size: Pairs (for cloning, and for `loss.pairs all`: segments) per step. null: 96 for lqr, else 16.
        eval_every: Steps between evaluations on held-out segments. null: 500 for lqr, else 250.
        success_every: Steps between evaluations in the environment; those at the start and at the end are always made.
        episodes: Episodes of an evaluation in the environment, with the same seeds every time.
    """

    bc_steps: int | None = ranged(None, "[1, inf)")
    steps: int | None = ranged(None, "[1, inf)")
    batch_size: int | None = ranged(None, "[1, 1e6]")
    eval_every: int | None = ranged(None, "[1, inf)")
    success_every: int = ranged(1500, "[1, inf)")
    episodes: int = ranged(50, "[1, inf)")


@dataclass(frozen=True)
class ControlConfig:
    """Contrastive preference learning for control: do log-probabilities fall after behaviour cloning, as they must?

    Args:
        task: `lqr`: a mass pushed to the origin, whose optimum is known in closed form; `bin-picking-v3`: Meta-World's
            task of that name (extra `control`), with episodes of a scripted policy with flaws, which are made once and
            cached; or an .npz file of episodes (arrays observations [E, T + 1, O], actions [E, T, A], rewards [E, T],
            lengths [E], and values [E, T + 1], NaN where unknown, for labels by regret).
        out: Folder with a run ARM-SEED for each arm and seed (config.yaml, metrics.jsonl, actor.npz, summary.json),
            summary.json, control.json and control.png; with the same command, finished runs stay and an interrupted
            one begins anew (SIGTERM ends it at once, with exit code 75).
        arms: with_bc: cloning of all segments, then CPL; without_bc: CPL from a random policy; with_bc_kl: cloning,
            then CPL-KL, on log-ratios; best_bc: cloning of the best 30 % by score only.
        seeds: Seeds of the policy and of the batches; each makes a run of each arm.
        optimizer: The optimizer and its schedule, the same for cloning and for CPL in all arms; its state begins anew
            with CPL.
    """

    task: str = path()
    out: str = path()
    arms: list[Arm] = field(default_factory=lambda: ["with_bc", "without_bc"])
    seeds: list[int] = ranged([0], SEEDS)
    actor: ActorOptions = field(default_factory=ActorOptions)
    segments: SegmentOptions = field(default_factory=SegmentOptions)
    loss: CplOptions = field(default_factory=CplOptions)
    optimizer: OptimizerOptions = field(
        default_factory=lambda: OptimizerOptions(learning_rate=1e-3, schedule="constant", max_grad_norm=0.0)
    )
    train: ControlTrainOptions = field(default_factory=ControlTrainOptions)


# What null means: block -> option -> (lqr, other tasks).
_DEFAULTS: dict[str, dict[str, tuple[Any, Any]]] = {
    "actor": {"kind": ("gaussian", "deterministic"), "hidden": ([], [256, 256]), "dropout": (0.0, 0.25)},
    "segments": {"length": (8, 64), "discount": (0.95, 0.99), "sampled": (True, False)},
    "loss": {"beta": (0.1, 0.0318), "bias": (1.0, 0.5), "discount": (0.95, 1.0)},
    "train": {"bc_steps": (6000, 3000), "steps": (8000, 3000), "batch_size": (96, 16), "eval_every": (500, 250)},
}


def with_task_defaults(config: ControlConfig) -> ControlConfig:
    """Fills in what the task determines where options were not given."""
    column = 0 if config.task == "lqr" else 1
    for block, defaults in _DEFAULTS.items():
        options = getattr(config, block)
        missing = {name: both[column] for name, both in defaults.items() if getattr(options, name) is None}
        config = replace(config, **{block: replace(options, **missing)})
    return config
