"""The verbs that read a model."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.compute import ComputeOptions, Dtype, MeshOptions
from qstar_jax.config.data import DataOptions
from qstar_jax.config.decode import DecodeOptions
from qstar_jax.config.variants import path


@dataclass(frozen=True)
class ScoreConfig:
    """The reward that a preference-trained model gives to each token of each answer.

    Args:
        model: Folder of a DPO run (or of one of its checkpoints), a Hugging Face folder, or a hub name.
        out: Folder for scores.jsonl, scores.identity.json and heatmap.html; they replace those of an earlier run there.
        reference: Folder or hub name of the reference; a DPO run carries its own.
        beta: Temperature of the rewards; a DPO run carries its own.
        answers: `pairs` scores chosen and rejected, `single` the one answer of each row (column `completion`).
        batch_size: Rows scored at once.
        show: How many rows to colour in the terminal and on the page.
        alternatives: How many of the policy's likeliest tokens to show beside each token of these rows.
        wrong: Column that marks what is wrong in an answer (in rejected ones, of pairs): a list of [start, end)
            character ranges, or of texts that occur in it once. How well low rewards find these tokens goes to
            credit.json.
        kind: Column that names the kind of a mistake, where there are several.
        data: `data.eval` is the file that is scored.
    """

    model: str = path()
    out: str = path()
    reference: str | None = path(None)
    beta: float | None = None
    answers: Literal["pairs", "single"] = "pairs"
    batch_size: int = 4
    show: int = 3
    alternatives: int = 5
    wrong: str | None = None
    kind: str = "kind"
    data: DataOptions = field(default_factory=DataOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class GuidancePair:
    """A model before and after tuning, whose difference is added to another one.

    Args:
        tuned: Folder or hub name.
        untuned: Folder or hub name.
        weight: Of the difference of their log-probabilities.
    """

    tuned: str = path()
    untuned: str = path()
    weight: float = 1.0


@dataclass(frozen=True)
class GenerateConfig:
    """Answers to prompts: greedy, sampled, searched for, or chosen by reward.

    Answers are written batch by batch. The same command goes on where it was broken off.

    Args:
        model: Folder of a run (or of one of its checkpoints), a Hugging Face folder, or a hub name.
        out: Folder for generations.jsonl, generations.identity.json and config.yaml. Answers already there are kept if
            the same settings, prompts and models made them; otherwise the verb refuses to mix them.
        prompt: One prompt, given here; otherwise `data.eval` is a file with a prompt column.
        reference: Folder or hub name of the reference, for objectives of reward and `decode.report_reference`; a DPO
            run carries its own.
        pairs: Models whose differences guide `model`: the sum of its log-probabilities and of weight * (tuned -
            untuned) is decoded (proxy tuning, emulated fine-tuning, DeRa). Each is {tuned: ..., untuned: ..., weight:
            ...}.
        batch_size: Prompts decoded at once.
    """

    model: str = path()
    out: str = path()
    prompt: str | None = None
    reference: str | None = path(None)
    pairs: list[GuidancePair] = field(default_factory=list)
    batch_size: int = 4
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    data: DataOptions = field(default_factory=DataOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class ExportConfig:
    """A model as a Hugging Face folder, which transformers, PEFT and inference servers read.

    Args:
        model: Folder of a run (or of one of its checkpoints), or anything else that the other verbs open.
        out: Folder to write; it must not hold a model yet.
        part: `model` writes the whole model, an adapter merged into it; `adapter` writes the adapter of a run alone, in
            PEFT's format.
        base: What the adapter's file names as its base; by default the folder or hub name that the run began from.
        dtype: Type of the stored tensors of a model; an adapter is float32.
        max_shard_size: Largest size of a file of weights, such as 5GB or 500MB (a KB is 1,000 bytes). A larger model is
            cut into several files with an index; a tensor that is larger has a file of its own. The default is that of
            huggingface_hub, not the 50GB of transformers 5: export holds one such file in memory beside the model, and
            a broken download loses no more than that.
        mesh: Devices that hold the model meanwhile.
    """

    model: str = path()
    out: str = path()
    part: Literal["model", "adapter"] = "model"
    base: str | None = path(None)
    dtype: Dtype = "float32"
    max_shard_size: str = "5GB"
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class EnvConfig:
    """Versions, devices and tested pairs: what to paste into a bug report."""
