"""Responses compared against a baseline: prompts whose file has a response too, and what a decoder responds."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import DataOptions, DecodeOptions, SweepConfig
from qstar_jax.console import track
from qstar_jax.data.dialogues import plain_text
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.loading import Dataset, make_dataset, read_records
from qstar_jax.data.records import Record, last_turn
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.generate import prepare
from qstar_jax.decoding.generations_file import GenerationsFile, generate_missing, prompt_texts, read_generations
from qstar_jax.decoding.options import interpret
from qstar_jax.evaluation.judges import Comparison
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.store.open import LoadedModel

Setting = TypeVar("Setting", bound=Hashable)  # a way to decode


@dataclass(frozen=True)
class Trial:
    """A prompt, and the baseline that responses to it are compared with.

    Attributes:
        example: The prompt as tokens.
        prompt: The prompt as plain text.
        baseline: The file's response as plain text.
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
    """Reads prompts and their baselines from `data.eval`; of rows with the same prompt the first counts.

    The baseline of a dialogue is the assistant's last turn.

    Returns:
        At least one trial, and the dataset of their examples, which lists the rows that are not tried.

    Raises:
        InputError: If the file cannot be used.
    """
    _, records, bad = read_records(data.eval, data.eval_split, "completions", data, data.max_eval_rows)
    records = list(map(last_turn, records))
    vocab = {"vocabulary": policy.model.config.vocab_size, "eos_ids": eos_token_ids(policy)}
    dataset = distinct_prompts(make_dataset(records, bad, data.eval, policy.tokenizer, data, **vocab))
    record_of_row = {record.row: record for record in records}
    return [Trial(example, *_texts(record_of_row[example.row])) for example in dataset.examples], dataset


def distinct_prompts(dataset: Dataset) -> Dataset:
    """Drops the rows of a dataset whose prompt an earlier row has."""
    distinct: dict[bytes, Example] = {}
    for example in dataset.examples:
        distinct.setdefault(example.prompt.tobytes(), example)
    examples = list(distinct.values())
    repeated = {example.row for example in dataset.examples} - {example.row for example in examples}
    dropped = sorted([*dataset.dropped, *(Dropped(row, REPEATED) for row in repeated)], key=lambda one: one.row)
    return replace(dataset, examples=examples, dropped=tuple(dropped))


def _texts(record: Record) -> tuple[str, str]:
    """Prompt and response as plain text, untruncated."""
    return plain_text(record.prompt), plain_text(record.responses[0])


def open_generations(config: SweepConfig, model: str, options: DecodeOptions, folder: Path) -> GenerationsFile:
    """Opens the file of one way to decode, as `qstar generate` writes it; no model is loaded, and nothing is written.

    Raises:
        InputError: If it holds responses that were made with other settings.
    """
    blocks = {"decode": options, "data": config.data, "compute": config.compute, "mesh": config.mesh}
    settings = {"model": model, "out": str(folder), "pairs": [], "batch_size": config.batch_size}
    return GenerationsFile(folder, settings | {name: asdict(block) for name, block in blocks.items()})


def generate_trials(
    file: GenerationsFile,
    policy: LoadedModel,
    options: DecodeOptions,
    dataset: Dataset,
    batch_size: int,
    mesh: Mesh,
    console: Console | None = None,
) -> list[dict]:
    """Responds to all prompts in one way, or reads what an interrupted sweep has generated; the file was checked.

    Returns:
        One record of generations.jsonl per prompt.
    """
    examples, texts = dataset.examples, prompt_texts(dataset, policy.tokenizer)
    if not texts.keys() <= file.prompts.keys():
        decoder = prepare(policy, interpret(options), mesh)
        with file:
            batches = generate_missing(decoder, dataset, texts, file, batch_size)
            total = -(-len(examples) // batch_size)
            for _ in track(console, batches, f"{file.folder.parent.name}, {file.folder.name}", total):
                pass
    generated = {record["row"]: record for record in read_generations(file.folder)}
    return [generated[example.row] for example in examples]


def score_trials(
    responses: Mapping[Setting, Sequence[dict]],
    trials: Sequence[Trial],
    policy: LoadedModel,
    reference: LoadedModel,
    *,
    beta: float,
    batch_size: int,
    mesh: Mesh,
) -> dict[Setting, list[ScoredResponse]]:
    """Scores responses under the policy and its reference, however they were decoded.

    For each setting there is one record of generations.jsonl per trial, and then one scored response.
    """
    # Wide beams mostly find the same responses: each distinct one is scored once, and all settings share a program.
    distinct: dict[tuple[int, ...], Example] = {}
    for records in responses.values():
        for trial, record in zip(trials, records, strict=True):
            response = Response(np.array(record["tokens"], np.int32), record["finish"] == "length")
            distinct[_key(trial, record)] = replace(trial.example, responses=(response,))
    dataset = Dataset(list(distinct.values()), (), "responses")
    scores = score_dataset(policy, reference.params, dataset, beta=beta, batch_size=batch_size, mesh=mesh)
    scored = dict(zip(distinct, scores, strict=True))
    return {
        setting: [scored[_key(trial, record)] for trial, record in zip(trials, records, strict=True)]
        for setting, records in responses.items()
    }


def _key(trial: Trial, record: dict) -> tuple[int, ...]:
    return trial.row, *record["tokens"]


def compare(responses: Sequence[dict], trials: Sequence[Trial]) -> list[Comparison]:
    """Pairs responses, one record of generations.jsonl per trial, with those of the file."""
    return [
        Comparison(trial.row, trial.prompt, record["text"], trial.baseline)
        for trial, record in zip(trials, responses, strict=True)
    ]
