"""Answers on trial: prompts with the answer to beat, what each way to decode makes of them, and what that is worth."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from jax.sharding import Mesh

from qstar_jax.config import DataOptions, DecodeOptions, SweepConfig
from qstar_jax.data.columns import Turns
from qstar_jax.data.dialogues import text_of
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.loading import Dataset, make_dataset, read_records
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.generate import prepare
from qstar_jax.decoding.generations_file import GenerationsFile, generate_missing, prompt_texts, read_generations
from qstar_jax.decoding.options import interpret
from qstar_jax.evaluation.judges import Comparison
from qstar_jax.evaluation.judges.base import Track, no_track
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.store.open import LoadedModel

Setting = TypeVar("Setting", bound=Hashable)  # a way to decode


@dataclass(frozen=True)
class Trial:
    """A prompt, and the answer that an answer on trial has to beat.

    Attributes:
        example: The prompt as tokens.
        prompt: The prompt as plain text.
        baseline: The file's answer as plain text.
    """

    example: Example
    prompt: str
    baseline: str

    @property
    def row(self) -> int:
        """Row of the file."""
        return self.example.row


REPEATED = "prompt of an earlier row"


def read_trials(data: DataOptions, policy: LoadedModel) -> tuple[list[Trial], Dataset]:
    """Reads prompts and the answers to beat; of rows with one prompt the first counts.

    Args:
        data: `eval` is the file.
        policy: The policy.

    Returns:
        At least one trial, and the data set of their examples, which names the rows that are not tried.

    Raises:
        InputError: If the file cannot be used.
    """
    _, records, bad = read_records(data.eval, data.eval_split, "completions", data, data.max_eval_rows)
    known = {"vocabulary": policy.model.config.vocab_size, "eos_ids": eos_token_ids(policy)}
    found = make_dataset(records, bad, data.eval, policy.tokenizer, data, **known)
    read = {record.row: record for record in records}
    distinct: dict[bytes, Example] = {}
    for example in found.examples:
        distinct.setdefault(example.prompt.tobytes(), example)
    tried = list(distinct.values())
    repeated = {example.row for example in found.examples} - {example.row for example in tried}
    dropped = sorted([*found.dropped, *(Dropped(row, REPEATED) for row in repeated)], key=lambda one: one.row)
    trials = [Trial(e, *_texts(read[e.row])) for e in tried]
    return trials, replace(found, examples=tried, dropped=tuple(dropped))


def _texts(record: Record) -> tuple[str, str]:
    """Prompt and answer as plain text, whole, as they were read."""
    return _plain(record.prompt), _plain(record.responses[0])


def _plain(turns: Turns) -> str:
    """Plain text: of one chat message its words, of several who said them too."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return text_of(turns)
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def open_generations(config: SweepConfig, model: str, options: DecodeOptions, folder: Path) -> GenerationsFile:
    """Opens the file of one way to decode; no model is loaded, and nothing is written.

    Args:
        config: The sweep.
        model: What the user called the policy.
        options: How to decode.
        folder: Holds, or gets, generations.jsonl as `qstar generate` writes it.

    Returns:
        The file.

    Raises:
        InputError: If it holds responses that were made with other settings.
    """
    blocks = {"decode": options, "data": config.data, "compute": config.compute, "mesh": config.mesh}
    settings = {"model": model, "out": str(folder), "pairs": [], "batch_size": config.batch_size}
    return GenerationsFile(folder, settings | {name: asdict(block) for name, block in blocks.items()})


def answer_trials(
    file: GenerationsFile,
    policy: LoadedModel,
    options: DecodeOptions,
    dataset: Dataset,
    batch_size: int,
    mesh: Mesh,
    track: Track = no_track,
) -> list[dict]:
    """Answers all prompts in one way, or reads what a broken run has answered.

    Args:
        file: Gets the answers; it was checked.
        policy: The policy.
        options: How to decode.
        dataset: The prompts.
        batch_size: Prompts decoded at once.
        mesh: Devices of the policy.
        track: Wraps the batches, for a progress bar.

    Returns:
        One record of generations.jsonl a prompt.
    """
    examples, texts = dataset.examples, prompt_texts(dataset, policy.tokenizer)
    if not texts.keys() <= file.prompts.keys():
        decoder = prepare(policy, interpret(options), mesh)
        with file:
            batches = generate_missing(decoder, dataset, texts, file, batch_size)
            total = -(-len(examples) // batch_size)
            for _ in track(batches, f"{file.folder.parent.name}, {file.folder.name}", total):
                pass
    found = {record["row"]: record for record in read_generations(file.folder)}
    return [found[example.row] for example in examples]


def score_trials(
    answers: Mapping[Setting, Sequence[dict]],
    trials: Sequence[Trial],
    policy: LoadedModel,
    reference: LoadedModel,
    *,
    beta: float,
    batch_size: int,
    mesh: Mesh,
) -> dict[Setting, list[ScoredResponse]]:
    """Scores answers under the policy and its reference, whatever they were drawn with.

    Args:
        answers: For each setting one record of generations.jsonl a trial.
        trials: The prompts.
        policy: The policy.
        reference: Its reference.
        beta: Temperature of the rewards.
        batch_size: Answers scored at once.
        mesh: Devices of the models.

    Returns:
        For each setting one record a trial.
    """
    distinct: dict[tuple[int, ...], Example] = {}  # wide beams mostly find the same answers
    for own in answers.values():
        for trial, answer in zip(trials, own, strict=True):
            response = Response(np.array(answer["tokens"], np.int32), answer["finish"] == "length")
            distinct[_key(trial, answer)] = replace(trial.example, responses=(response,))
    dataset = Dataset(list(distinct.values()), (), "answers")  # one for all settings, so one program
    found = score_dataset(policy, reference.params, dataset, beta=beta, batch_size=batch_size, mesh=mesh)
    scored = dict(zip(distinct, found, strict=True))
    return {
        setting: [scored[_key(trial, answer)] for trial, answer in zip(trials, own, strict=True)]
        for setting, own in answers.items()
    }


def _key(trial: Trial, answer: dict) -> tuple[int, ...]:
    """What tells answers apart."""
    return trial.row, *answer["tokens"]


def compare(answers: Sequence[dict], trials: Sequence[Trial]) -> list[Comparison]:
    """Sets answers against those of the file.

    Args:
        answers: One record of generations.jsonl a trial.
        trials: The prompts and the answers to beat.

    Returns:
        One comparison a trial.
    """
    return [
        Comparison(trial.row, trial.prompt, answer["text"], trial.baseline)
        for trial, answer in zip(trials, answers, strict=True)
    ]
