"""The plan of `qstar pipeline`: its options, checked and resolved before anything is loaded or written."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from qstar_jax.config import DataOptions, DpoConfig, LoraOptions, LossOptions, PipelineConfig, StageOptions
from qstar_jax.config.compare import first_difference
from qstar_jax.config.paths import check_paths
from qstar_jax.config.ranges import check_ranges
from qstar_jax.errors import InputError
from qstar_jax.pipeline.template import PROMPT, Template
from qstar_jax.tasks import Task, find
from qstar_jax.training.continuation import FREE_OPTIONS, check_folder
from qstar_jax.training.plan import RunPlan, make_plan

VERB = "pipeline"
_RESERVED = (PROMPT, "tensorboard")  # the user's prompt in templates; a folder of the run
# Options that a resumed run may change: those of `qstar dpo`, and those of other modes and of evaluations.
_FREE = (*FREE_OPTIONS, "data.prompts", "data.split", "data.max_prompts", "samples")


@dataclass(frozen=True)
class PipelinePlan:
    """What a run does.

    Attributes:
        config: Its options; the stages of a finished run, if it names one.
        task: The task that knows the true reward of the last text, if any.
        runs: Name -> plan of each trained stage, which is one of `qstar dpo` in a folder of its own.
    """

    config: PipelineConfig
    task: Task | None
    runs: dict[str, RunPlan]

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return Path(self.config.out).expanduser()

    @property
    def stages(self) -> Sequence[StageOptions]:
        """The stages."""
        return self.config.stages

    def data(self, stage: StageOptions) -> DataOptions:
        """How the texts of a stage become tokens."""
        return DataOptions(
            as_chat=stage.as_chat,
            max_length=stage.max_length,
            max_prompt_length=stage.max_prompt_length,
            layout=self.config.data.layout,
        )


def make_pipeline_plan(config: PipelineConfig) -> PipelinePlan:
    """Resolves the options of a run.

    Raises:
        InputError: If options are missing, contradict each other, or have no effect.
    """
    check_paths(config)
    check_ranges(config)
    if config.run is not None:
        config = _with_run(config)
    check_stages(config.stages)
    task = _find_task(config)
    if config.mode != "train":
        _check_finished(config)
        return PipelinePlan(config, task, {})
    _check_training(config)
    plan = PipelinePlan(config, task, {})
    runs = {stage.name: _run_plan(plan, stage) for stage in config.stages if stage.train}
    return replace(plan, runs=runs)


def check_stages(stages: Sequence[StageOptions]):
    """Refuses stages that make no pipeline.

    Raises:
        InputError: If there are none, or one has a name, a template or a number that has no meaning.
    """
    if not stages:
        raise InputError("stages: none given; expected a list of {name: ..., model: ..., template: ...}, or --run")
    known = [PROMPT]
    for place, stage in enumerate(stages):
        where = f"stages[{place}]"
        if not re.fullmatch(r"[A-Za-z]\w*", stage.name, re.ASCII) or stage.name in _RESERVED:
            raise InputError(
                f"{where}.name {stage.name!r}: expected letters, digits and _, and not {' or '.join(_RESERVED)}"
            )
        if stage.name in known:
            raise InputError(f"{where}.name {stage.name!r} is that of an earlier stage; give each its own")
        Template(stage.template).check(known, f"{where}.template")
        if not stage.beta > 0:
            raise InputError(f"{where}.beta {stage.beta:g}: expected a number above 0, reward per nat")
        if stage.max_new_tokens < 1:
            raise InputError(f"{where}.max_new_tokens {stage.max_new_tokens}: expected at least 1")
        if not stage.train and stage.lora != LoraOptions():
            raise InputError(f"{where}.lora has no effect with train false; remove one of them")
        known.append(stage.name)


def stages_of_run(run: str) -> list[StageOptions]:
    """Reads the stages of a finished training; their models are the folders of its stages.

    Raises:
        InputError: If there is no such run.
    """
    path = Path(run).expanduser() / "config.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = [StageOptions(**{**stage, "lora": LoraOptions(**stage["lora"])}) for stage in stored["stages"]]
        is_training = stored["mode"] == "train"
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise InputError(f"{path}: no training of qstar pipeline ({str(error).splitlines()[0]})") from error
    if not is_training:
        raise InputError(f"{path} is of mode {stored['mode']}; expected the folder of a training")
    return [replace(stage, model=str(path.parent / stage.name)) if stage.train else stage for stage in stages]


def _with_run(config: PipelineConfig) -> PipelineConfig:
    if config.stages:
        raise InputError(f"--run {config.run} has stages of its own, and stages are given too; leave one out")
    if config.mode == "train":
        raise InputError(
            f"--run {config.run} has no effect with mode train; to train its stages further, name their folders as "
            "stages, or continue it with --resume"
        )
    return replace(config, stages=stages_of_run(config.run))


def _find_task(config: PipelineConfig) -> Task | None:
    if config.task is None:
        if config.samples.label in ("bradley_terry", "best"):
            raise InputError(f"samples.label {config.samples.label} needs --task, which knows true rewards, or none")
        return None
    found = find(config.task)
    if found is None or found[0].true_reward is None:
        raise InputError(
            f"--task {config.task} is no built-in task that knows the true reward of a text, such as builtin:tiny-tldr"
        )
    return found[0]


def _check_finished(config: PipelineConfig):
    """Refuses what `mode sample` and `mode score` lack, and what would mislead there."""
    if config.resume:
        raise InputError(f"--resume has no effect with mode {config.mode}; remove it")
    if config.mode == "sample" and not config.data.prompts:
        raise InputError("mode sample needs --data.prompts: a file with a column prompt, or a built-in task")
    if config.mode == "score" and config.run is None:
        raise InputError("mode score needs --run: the folder of a training, whose rewards are split among its stages")
    if config.mode == "score" and not config.data.eval:
        raise InputError("mode score needs --data.eval: the rows whose rewards are split")
    if (Path(config.out).expanduser() / "config.yaml").exists():
        raise InputError(f"{config.out} holds a training; choose another --out for mode {config.mode}")
    _check_samples(config)


def _check_samples(config: PipelineConfig):
    samples = config.samples
    if samples.batch_size < 1 or samples.eval_prompts < 0 or not samples.temperature > 0:
        raise InputError(
            f"samples.batch_size {samples.batch_size} must be at least 1, samples.eval_prompts {samples.eval_prompts} "
            f"at least 0, and samples.temperature {samples.temperature:g} above 0"
        )


def _check_training(config: PipelineConfig):
    if not config.data.train:
        raise InputError("mode train needs --data.train: a file of preferences (mode sample makes one)")
    if not any(stage.train for stage in config.stages):
        raise InputError("no stage is trained; set train: true for at least one")
    _check_samples(config)
    train = config.train
    refused = {"keep_best": None, "patience": 0, "reference_samples": 0, "show_responses": 0}
    for name, off in refused.items():
        if getattr(train, name) != off:
            raise InputError(
                f"train.{name} {getattr(train, name)} is not supported by qstar pipeline; leave it out (mode sample "
                "--run shows what the pipeline writes, samples.eval_prompts measures it)"
            )


def _run_plan(plan: PipelinePlan, stage: StageOptions) -> RunPlan:
    """The plan of a trained stage: that of `qstar dpo` on its own part of the rows."""
    config = plan.config
    dpo = DpoConfig(
        model=stage.model,
        out=str(plan.out / stage.name),
        resume=config.resume,
        data=replace(plan.data(stage), train=config.data.train, eval=config.data.eval),
        loss=LossOptions(beta=stage.beta),
        optimizer=config.optimizer,
        train=config.train,
        lora=stage.lora,
        compute=config.compute,
        mesh=config.mesh,
    )
    try:
        return replace(make_plan(dpo), verb=VERB)
    except InputError as error:
        raise InputError(f"stage {stage.name}: {error}") from error


def check_run_folder(plan: PipelinePlan) -> list[str]:
    """Checks what the folders of a training hold.

    Returns:
        What the user should know.

    Raises:
        InputError: If they hold another run, or one that is not to be resumed.
    """
    path, config = plan.out / "config.yaml", plan.config
    if path.is_file():
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path}: not readable ({str(error).splitlines()[0]}); choose another --out") from error
        if not isinstance(stored, dict) or "stages" not in stored:
            raise InputError(f"{path} is of another verb than pipeline; choose another --out")
        different = first_difference(stored, asdict(config), _FREE)
        if config.resume and different:
            name, before, now = different
            raise InputError(
                f"--resume: {name} was {before!r} in {config.out} and is {now!r} now; a run resumes with the "
                "options it began with (or starts over in another --out)"
            )
    return [note for run in plan.runs.values() if (note := check_folder(run))]
