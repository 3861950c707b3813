"""The verb that trains several models end to end, and its blocks."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.compute import ComputeOptions, MeshOptions
from qstar_jax.config.optimizer import OptimizerOptions
from qstar_jax.config.train import LoraOptions, TrainOptions
from qstar_jax.config.variants import path


@dataclass(frozen=True)
class StageOptions:
    """A language model of a pipeline.

    Args:
        name: Its name, in templates, rows and metrics, and the folder of its run in `out`.
        model: Hugging Face folder, hub name, or folder of an earlier run; also its frozen reference.
        template: Its prompt: text with {prompt}, the user's, and the names of earlier stages in braces, which stand for
            what they wrote; {{ and }} are braces.
        as_chat: Make that prompt a user's message, by the tokenizer's chat template.
        train: Whether it is trained; a stage that is not stays its reference.
        beta: Temperature: reward per nat.
        max_new_tokens: Longest output when it is sampled, EOS included.
        max_length: Longest prompt and output together, in tokens; longer ones are refused.
        max_prompt_length: Longest prompt; null: half of `max_length`.
    """

    name: str
    model: str = path()
    template: str = "{prompt}"
    as_chat: bool = False
    train: bool = True
    beta: float = 0.1
    max_new_tokens: int = 64
    max_length: int = 1024
    max_prompt_length: int | None = None
    lora: LoraOptions = field(default_factory=LoraOptions)


@dataclass(frozen=True)
class PipelineDataOptions:
    """Where preferences and prompts come from.

    Args:
        train: File of preferences to train on: rows of prompt, chosen and rejected, these two with the text of every
            stage by its name; or of prompt, outputs (two of these) and better (0 or 1; null: not compared, not read).
        eval: Held-out preferences in the same form; `mode score` scores these. null: no evaluation.
        prompts: Prompts of `mode sample`: a file with a column prompt, or a built-in task.
        split: Split of `prompts`, if there are several.
        layout: How prompts and outputs share sequences in training, see `qstar dpo`.
        max_train_rows: Read only the first N rows of `train`.
        max_eval_rows: Read only the first N rows of `eval`.
        max_prompts: Read only the first N rows of `prompts`.
    """

    train: str | None = path(None)
    eval: str | None = path(None)
    prompts: str | None = path(None)
    split: str = "train"
    layout: Literal["packed", "plain"] = "packed"
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    max_prompts: int | None = None


@dataclass(frozen=True)
class RunSamplesOptions:
    """Runs of the whole pipeline, for `mode sample` and for evaluations.

    Args:
        label: How `mode sample` compares two runs to a prompt by `task`: `bradley_terry` prefers one with probability
            sigma(difference of true rewards), `best` the better one; `none` leaves that to people. null: bradley_terry
            with a task, else none.
        batch_size: Prompts at a time.
        seed: Seed of samples and labels.
        temperature: Divides the logits of all stages in `mode sample`; evaluations sample the policies as they are.
        eval_prompts: Prompts of `data.eval` to which the pipeline is sampled at each evaluation of a training, for the
            KL of each stage and the true reward of `task`; 0: none.
    """

    label: Literal["bradley_terry", "best", "none"] | None = None
    batch_size: int = 32
    seed: int = 0
    temperature: float = 1.0
    eval_prompts: int = 64


@dataclass(frozen=True)
class PipelineConfig:
    """Several language models, one after the other, trained end to end by preferences between final outputs.

    Args:
        out: Folder of the run: config.yaml, metrics.jsonl, curves.png, summary.json, and for each trained stage a run
            folder of its name, which other verbs read as one of `qstar dpo`. `mode sample` leaves pairs.jsonl there,
            `mode score` scores.jsonl and summary.json.
        mode: `train` trains; `sample` makes rows of preferences from two runs of the pipeline to each prompt; `score`
            splits the reward of each row of `data.eval` among the stages of a finished run: which is to blame. One
            file may serve `train` and `sample`, and each reads its part. `sample` reads `stages` or `run`, `task`,
            `data.prompts`, `data.split`, `data.max_prompts`, and `samples` but `eval_prompts`; `score` reads `run`,
            `data.eval`, `data.max_eval_rows`, `data.layout`, `train.eval_batch_size` and `train.batch_size`; both read
            `compute` and `mesh`. `train` reads all but `run`, the prompts, `samples.label` and `samples.temperature`.
        stages: The models, in their order; each is {name: ..., model: ..., template: ...}.
        run: Folder of a finished training whose stages are scored, or sampled, instead of `stages`.
        task: Built-in task that knows the true reward of what comes out at the end, such as builtin:tiny-tldr.
        resume: Continue from the newest checkpoint that all stages have, with the options and data that the run began
            with; without a checkpoint, begin at step 0. `auto` means the same: launchers may always pass it.
        optimizer: The optimizer of each stage, with a state and a gradient norm of its own.
        train: A row is a pair of runs.
    """

    out: str = path()
    mode: Literal["train", "sample", "score"] = "train"
    stages: list[StageOptions] = field(default_factory=list)
    run: str | None = path(None)
    task: str | None = path(None)
    resume: bool | Literal["auto"] = False
    data: PipelineDataOptions = field(default_factory=PipelineDataOptions)
    samples: RunSamplesOptions = field(default_factory=RunSamplesOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=lambda: TrainOptions(reference_samples=0))
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
