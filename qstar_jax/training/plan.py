"""The plan of a run: its resolved options and its objective, made before anything is loaded or written."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from qstar_jax.config import DpoConfig, ReferenceOptions, RlConfig, SftConfig, WeightingOptions
from qstar_jax.config.paths import check_paths
from qstar_jax.config.ranges import check_ranges
from qstar_jax.config.variants import check_variant, declarations, fill_in
from qstar_jax.errors import InputError
from qstar_jax.losses import TOKEN_WEIGHTS, make_loss
from qstar_jax.training.objectives import Objective, Weigh, preference_objective, sft_objective, single_objective
from qstar_jax.training.optimizers import check_steps
from qstar_jax.training.profile import profile_range
from qstar_jax.training.reference import resolve_reference
from qstar_jax.training.trackers import check_trackers


@dataclass(frozen=True)
class RunPlan:
    """What a run does.

    Attributes:
        verb: The verb that asks for it: "sft", "dpo" or "rl".
        config: Its options, with every default filled in.
        objective: What it minimizes.
        reference: The reference of the objective; its mode is `none` if there is none.
    """

    verb: str
    config: SftConfig | DpoConfig | RlConfig
    objective: Objective
    reference: ReferenceOptions = ReferenceOptions(mode="none")

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return Path(self.config.out)

    @property
    def holds_reference(self) -> bool:
        """Whether a second copy of the parameters is held for the reference."""
        return self.reference.mode == "live"

    @property
    def runs_reference(self) -> bool:
        """Whether the reference's forward pass is part of each step."""
        return self.reference.mode in ("live", "adapter")

    @property
    def moves_reference(self) -> bool:
        """Whether the reference's parameters change during the run."""
        return self.reference.sync_every > 0

    def with_date(self, date: str | None) -> "RunPlan":
        """The same plan with the day that chat templates take for today, which a resumed run keeps."""
        return replace(self, config=replace(self.config, data=replace(self.config.data, date=date)))


def make_plan(config: SftConfig | DpoConfig) -> RunPlan:
    """Resolves a run's options, and chooses its objective.

    Raises:
        InputError: If options are missing, or contradict each other.
    """
    check_paths(config)
    check_ranges(config)
    if not config.data.train:
        raise InputError("--data.train is missing: name a file, a folder or a dataset of the hub")
    is_sft = isinstance(config, SftConfig)
    check_train(config, ("loss",) if is_sft else ("loss", "rewards/margins", "rewards/accuracies"))
    if is_sft:
        return RunPlan("sft", config, sft_objective())
    loss = make_loss(**asdict(config.loss))
    weigh = _weigh(config.weighting)
    if weigh is not None and loss.reads_single:
        raise InputError(f"weighting.transform has no effect with loss.name {loss}; weighted_sigmoid reads it")
    objective = single_objective(loss) if loss.reads_single else preference_objective(loss, weigh)
    reference = resolve_reference(config.reference, objective, config.lora.rank)
    if config.train.accumulate > 1 and objective.couples_examples and objective.prepare is None:
        raise InputError(
            f"train.accumulate {config.train.accumulate}: {loss} looks at its whole batch, and would see "
            "micro-batches; set it to 1, or loss.normalize answer_tokens where that is the reason"
        )
    # Each loss of a list has defaults of its own, so only those of a single loss are filled in.
    options = config.loss if isinstance(config.loss.name, list) else replace(config.loss, **loss.options[0])
    return RunPlan("dpo", replace(config, loss=options, reference=reference), objective, reference)


def _weigh(options: WeightingOptions) -> Weigh | None:
    """Binds the options of the transform that makes weights of tokens; None if there is none."""
    check_variant(options, "weighting")
    if options.transform == "none":
        return None
    read = {name for name, option in declarations(WeightingOptions).items() if options.transform in option.defaults}
    bound = {name: value for name, value in asdict(fill_in(options)).items() if name in read}
    if "low" in bound and not bound["low"] < bound["high"]:
        raise InputError(f"weighting.low {bound['low']} must be below weighting.high {bound['high']}")
    return partial(TOKEN_WEIGHTS[options.transform], **bound)


def check_train(config: SftConfig | DpoConfig | RlConfig, metrics: Collection[str]):
    """Refuses training options that contradict each other; `metrics` are those by which a run may be judged best."""
    train = config.train
    check_trackers(config.log)
    profile_range(train.profile)
    if train.steps < 0:
        raise InputError(f"train.steps is {train.steps}; expected at least 0 (0: as many as train.epochs take)")
    if train.epochs is not None and train.steps:
        raise InputError(f"train.steps {train.steps} and train.epochs {train.epochs} contradict each other; set one")
    if train.epochs is not None and train.epochs <= 0:
        raise InputError(f"train.epochs {train.epochs}: expected more than 0 passes over the rows")
    intervals = {f"train.{name}": getattr(train, name) for name in ("log_every", "eval_every", "save_every")}
    for name, value in (intervals | {"optimizer.warmup_steps": config.optimizer.warmup_steps}).items():
        check_steps(name, value)
    if train.reference_samples < 0 or train.reference_samples == 1:
        raise InputError(
            f"train.reference_samples is {train.reference_samples}; expected 0, or at least 2 for a standard error"
        )
    if train.patience < 0 or (train.patience and train.keep_best is None):
        raise InputError(
            f"train.patience {train.patience}: expected 0, or a number of evaluations of train.keep_best, the metric "
            "that must improve"
        )
    if train.keep_best is None:
        return
    if config.data.eval is None or not train.eval_every:
        missing = "train.eval_every, the steps between evaluations" if config.data.eval else "data.eval, held-out rows"
        raise InputError(f"train.keep_best {train.keep_best} needs {missing}")
    if train.keep_best not in metrics:
        raise InputError(
            f"train.keep_best {train.keep_best} is not measured by this verb; set it to {' or '.join(metrics)}"
        )
