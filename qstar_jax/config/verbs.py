"""The verbs that read a model."""

from dataclasses import dataclass, field
from typing import Literal

from qstar_jax.config.compute import ComputeOptions, Dtype, MeshOptions
from qstar_jax.config.data import DataOptions
from qstar_jax.config.decode import DecodeOptions
from qstar_jax.config.ranges import ranged
from qstar_jax.config.variants import path


@dataclass(frozen=True)
class DataConfig:
    """What a file of data holds: its format, rows that cannot be used, lengths, and what training would see.

    Args:
        file: What `data.train` may name: a file, a folder, a pattern, or a dataset on the hub.
        model: Folder or hub name of a model, or folder of a run, whose tokenizer shows rows as training sees them;
            null: text only.
        split: Split to read if `file` has splits.
        kind: What its rows become; null: what its columns suggest.
        show: Number of rows to show.
        data: How rows are read; `data.max_train_rows` reads only the first.
    """

    file: str = path()
    model: str | None = path(None)
    split: str = "train"
    kind: Literal["preferences", "rankings", "labels", "returns", "completions", "prompts"] | None = None
    show: int = ranged(2, "[0, inf)")
    data: DataOptions = field(default_factory=DataOptions)


@dataclass(frozen=True)
class ChatConfig:
    """A conversation with a model in the terminal.

    Args:
        model: Folder of a run (or of one of its checkpoints), a Hugging Face folder, or a hub name; its tokenizer needs
            a chat template.
        system: System message.
        rewards: Colour each token of the replies by its reward, which takes a DPO run, or `reference` and `beta`.
        reference: Folder or hub name of the reference; a DPO run brings its own.
        beta: Temperature of the rewards: reward per nat; a DPO run brings its own.
        decode: How to reply.
        compute: Options of the computation.
        mesh: How to shard the model over devices.
    """

    model: str = path()
    system: str | None = None
    rewards: bool = False
    reference: str | None = path(None)
    beta: float | None = None
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class ViewConfig:
    """A page on this machine where prompts and responses are typed and scored (extra `view`).

    Args:
        model: Folder of a DPO run (or of one of its checkpoints), a Hugging Face folder, or a hub name.
        reference: Folder or hub name of the reference; a DPO run brings its own.
        beta: Temperature of the rewards: reward per nat; a DPO run brings its own.
        port: Port on the loopback interface; 0: any that is free.
        alternatives: Number of the policy's most likely tokens to show beside each token.
        beams: Width of the searches.
        max_new_tokens: Longest response of a search, EOS included.
        compute: Options of the computation.
        mesh: How to shard the model over devices.
    """

    model: str = path()
    reference: str | None = path(None)
    beta: float | None = None
    port: int = 8000
    alternatives: int = 5
    beams: int = 5
    max_new_tokens: int = 64
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class ScoreConfig:
    """The reward that a preference-trained model gives to each token of each response.

    Args:
        model: Folder of a DPO run (or of one of its checkpoints), a Hugging Face folder, or a hub name.
        out: Folder for scores.jsonl, scores.identity.json and heatmap.html; they replace those of an earlier run there.
            Until all are scored, scores.partial.jsonl keeps them, and an interrupted command goes on from there.
        reference: Folder or hub name of the reference; a DPO run brings its own.
        beta: Temperature of the rewards: reward per nat; a DPO run brings its own.
        answers: `pairs` scores chosen and rejected responses, `single` the one response of each row (column
            `completion`).
        batch_size: Rows scored at once.
        show: Number of rows to colour in the terminal and on the page.
        alternatives: Number of the policy's most likely tokens to show beside each token of these rows.
        wrong: Column that marks the mistakes of a response (of the rejected one, for pairs): a list of [start, end)
            character ranges, or of texts that occur in it once. How well low rewards find these tokens is written to
            credit.json.
        kind: Column that names the kind of each mistake, if there are several.
        steps: Also find the steps of the responses (`data.step_delimiter`), with the reward of each and the value after
            it, and the first that is suspected to be wrong.
        wrong_step: Column that says which steps of a single response are wrong: the number of the first one, from 0, or
            -1 if all are right; or a list of numbers, or of marks as for `wrong`, empty if all are right. How well low
            rewards find the first error is written to steps.json.
        threshold: A step whose reward is below it is suspected; null: the threshold with the highest F1 on the
            calibration split where `wrong_step` tells the truth, else 0: steps that lower the value.
        calibration: Share of the prompts that calibrate thresholds; the others are measured.
        data: `data.eval` is the file to score.
    """

    model: str = path()
    out: str = path()
    reference: str | None = path(None)
    beta: float | None = None
    answers: Literal["pairs", "single"] = "pairs"
    batch_size: int = 4
    show: int = ranged(3, "[0, inf)")
    alternatives: int = 5
    wrong: str | None = None
    kind: str = "kind"
    steps: bool = False
    wrong_step: str | None = None
    threshold: float | None = None
    calibration: float = 0.5
    data: DataOptions = field(default_factory=DataOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class GuidancePair:
    """A model before and after tuning, whose difference guides another model.

    Args:
        tuned: Folder or hub name.
        untuned: Folder or hub name.
        weight: Weight of the difference of their log-probabilities.
    """

    tuned: str = path()
    untuned: str = path()
    weight: float = 1.0


@dataclass(frozen=True)
class GenerateConfig:
    """Responses to prompts: greedy, sampled, searched for, or chosen by reward.

    Responses are written batch by batch. The same command continues an interrupted run.

    Args:
        model: Folder of a run (or of one of its checkpoints), a Hugging Face folder, or a hub name.
        out: Folder for generations.jsonl, generations.identity.json and config.yaml. Responses in it are kept if the
            same settings, prompts and models made them; otherwise the verb refuses to mix them.
        prompt: A single prompt; otherwise `data.eval` is a file with a prompt column.
        reference: Folder or hub name of the reference, for objectives that read rewards and
            `decode.report_reference`; a DPO run brings its own.
        pairs: Models whose differences guide `model`: the sum of its log-probabilities and of weight * (tuned -
            untuned) is decoded (proxy tuning, emulated fine-tuning, DeRa). Each is {tuned: ..., untuned: ..., weight:
            ...}.
        batch_size: Prompts per batch.
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
class PlayConfig:
    """Games of the package textarena, played by a model: dialogues with their returns, to train on.

    Args:
        model: Folder of a run (or of one of its checkpoints), a Hugging Face folder, or a hub name; it needs a chat
            template.
        out: Folder for games.jsonl (columns `messages`, `reward` and `label`: a_star, qrpo and implicit_prm read it,
            and kto where games begin differently), pairs.jsonl (if games are repeated: the best and the worst of each)
            and config.yaml.
        game: Name of a game of one player in textarena, such as GuessTheNumber-v0 or Mastermind-v0.
        games: Number of games, each with a seed of its own.
        repeats: How often each of them is played, with the same secret.
        seed: Seed of the first game.
        win: Return from which on a game is labelled as desirable.
        max_turns: Most turns of the model; a game that has not ended then has no return.
        max_length: Longest dialogue; a game that outgrows it has no return.
        batch_size: Games played at once.
    """

    model: str = path()
    out: str = path()
    game: str = "GuessTheNumber-v0"
    games: int = 64
    repeats: int = 1
    seed: int = 0
    win: float = 1.0
    max_turns: int = 32
    max_length: int = 2048
    batch_size: int = 16
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)


@dataclass(frozen=True)
class ExportConfig:
    """A model as a Hugging Face folder, which transformers, PEFT and inference servers read.

    Args:
        model: Folder of a run (or of one of its checkpoints), or anything else that the other verbs open.
        out: Folder to write; it must not hold a model yet.
        part: `model` writes the whole model, with an adapter merged into it; `adapter` writes only the adapter of a
            run, in PEFT's format.
        base: Base that the adapter's file names; null: the folder or hub name that the run began from.
        dtype: Dtype of the stored tensors of a model; an adapter is float32.
        max_shard_size: Largest size of a file of weights, such as 5GB or 500MB (a KB is 1,000 bytes). A larger model is
            sharded into several files with an index; a tensor that is larger has its own file. The default is that of
            huggingface_hub, not the 50GB of transformers 5: export holds one such file in memory beside the model, and
            a broken download loses no more than that.
        mesh: Devices that hold the model during the export.
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
