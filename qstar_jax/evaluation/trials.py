"""Answers on trial: prompts with the answer to beat, what each way to decode makes of them, and what that is worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qstar_jax.config import GenerateConfig, SweepConfig
from qstar_jax.data.columns import Turns
from qstar_jax.data.dialogues import text_of
from qstar_jax.data.loading import Dataset, load_examples, read_records
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.decoding.answers_file import AnswersFile, answer_prompts, read_answers
from qstar_jax.decoding.generate import prepare
from qstar_jax.evaluation.judges import Comparison
from qstar_jax.evaluation.judges.base import Track, Verdict, no_track
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.sweep import Outcome, Setting
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.loading import LoadedModel


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


def read_trials(config: SweepConfig, tokenizer: Any) -> list[Trial]:
    """Reads prompts and the answers to beat; of rows with one prompt the first counts.

    Args:
        config: The sweep.
        tokenizer: Of the policy.

    Returns:
        At least one trial.

    Raises:
        InputError: If the file cannot be used.
    """
    data = config.data
    _, records, _ = read_records(data.eval, data.eval_split, "completions", data, data.max_eval_rows)
    read = {record.row: record for record in records}
    examples = load_examples(data.eval, data.eval_split, "completions", tokenizer, data, data.max_eval_rows).examples
    trials: dict[bytes, Trial] = {}
    for example in examples:
        trials.setdefault(example.prompt.tobytes(), Trial(example, *_texts(read[example.row])))
    return list(trials.values())


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


def answer_trials(
    config: SweepConfig,
    model: str,
    policy: LoadedModel,
    setting: Setting,
    trials: Sequence[Trial],
    folder: Path,
    mesh: Mesh,
    track: Track = no_track,
) -> list[dict]:
    """Answers all prompts in one way, or reads what a broken run has answered.

    Args:
        config: The sweep.
        model: What the user called the policy.
        policy: The policy.
        setting: How to decode.
        trials: The prompts.
        folder: Gets generations.jsonl, as `qstar generate` writes it.
        mesh: Devices of the policy.
        track: Wraps the batches, for a progress bar.

    Returns:
        One record of generations.jsonl a trial.

    Raises:
        InputError: If the folder holds answers that were made with other settings.
    """
    file = AnswersFile(
        GenerateConfig(
            model=model,
            out=str(folder),
            batch_size=config.batch_size,
            decode=setting.options(config),
            data=config.data,
            compute=config.compute,
            mesh=config.mesh,
        )
    )
    examples = [trial.example for trial in trials]
    if not all(trial.row in file.prompts for trial in trials):
        texts = {example.row: policy.tokenizer.decode(example.prompt) for example in examples}
        decoder = prepare(policy, setting.options(config), mesh)
        with file:
            batches = answer_prompts(decoder, examples, texts, file, config.batch_size)
            total = -(-len(examples) // config.batch_size)
            for _ in track(batches, f"{folder.parent.name}, {folder.name}", total):
                pass
    found = {record["row"]: record for record in read_answers(folder)}
    return [found[trial.row] for trial in trials]


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


def outcomes(
    scored: Sequence[ScoredResponse],
    comparisons: Sequence[Comparison],
    verdicts: Sequence[Verdict],
    true_reward: Callable[[str, str], float | None],
) -> list[Outcome]:
    """Brings together what is known of each answer.

    Args:
        scored: Rewards of the answers.
        comparisons: What was judged.
        verdicts: How.
        true_reward: (prompt, answer) -> its true reward, or None.

    Returns:
        One outcome a trial.
    """
    return [
        Outcome(
            row=record.row,
            win=verdict.win,
            length=len(record.token_ids),
            logp=float(sum(record.logp)),
            implicit_reward=record.total_reward,
            true_reward=true_reward(comparison.prompt, comparison.answer),
            truncated=record.truncated,
        )
        for record, comparison, verdict in zip(scored, comparisons, verdicts, strict=True)
    ]
