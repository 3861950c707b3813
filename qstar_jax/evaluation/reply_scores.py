"""The scores by which `qstar select` selects: implicit rewards of responses and of their steps, from a run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import DataOptions
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.decoding.generations_file import DROPPED, prompt_texts
from qstar_jax.errors import InputError
from qstar_jax.evaluation.questions import Place
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.evaluation.step_marks import with_steps
from qstar_jax.evaluation.token_rewards import score_dataset
from qstar_jax.store.open import LoadedModel

LIKELIHOOD = "log pi_ref"  # the control: sums of the reference's log-probabilities


@dataclass(frozen=True)
class Judge:
    """The models whose rewards score responses.

    Attributes:
        policy: The preference-trained model.
        reference: Its reference.
        beta: Temperature of the rewards: reward per nat.
        mesh: Devices.
    """

    policy: LoadedModel
    reference: LoadedModel
    beta: float
    mesh: Mesh


def score_responses(
    judge: Judge, dataset: Dataset, rows: Sequence[dict], data: DataOptions, *, batch_size: int, console: Console
) -> list[ScoredResponse]:
    """Scores the responses of a dataset and finds their steps; each distinct one is scored once.

    Responses of similar lengths are scored together, the longest first, so that batches hold little padding.

    Args:
        judge: The models.
        dataset: Prompts with one response each.
        rows: Rows of the file, of which a column may list the steps.
        data: `data.step_delimiter` says what ends a step.
        batch_size: Responses scored at once.
        console: Where to show progress.

    Returns:
        One record per example, in their order.
    """
    examples = dataset.examples
    keys = [(e.prompt.tobytes(), e.responses[0].ids.tobytes(), e.responses[0].truncated) for e in examples]
    distinct = {key: index for index, key in reversed([*enumerate(keys)])}  # the first of each
    length = {key: len(examples[i].prompt) + len(examples[i].responses[0].ids) for key, i in distinct.items()}
    order = sorted(distinct, key=lambda key: (-length[key], distinct[key]))
    scored = score_dataset(
        judge.policy,
        judge.reference.params,
        replace(dataset, examples=[examples[distinct[key]] for key in order]),
        beta=judge.beta,
        batch_size=batch_size,
        mesh=judge.mesh,
        console=console,
        description=f"scoring {len(order):,} responses",
    )
    by_key = dict(zip(order, with_steps(scored, rows, data, judge.policy.tokenizer.all_special_ids), strict=True))
    return [by_key[key] for key in keys]


def selection_scores(responses: Sequence[ScoredResponse], places: Sequence[Place]) -> dict[Place, dict[str, float]]:
    """The scores by which responses are selected.

    Args:
        responses: Scored responses, with steps or without.
        places: Row and rank of each.

    Returns:
        Place -> `sum` of the rewards, which is the outcome reward; `min`, `mean` and `last` of the rewards of the
        steps, unless every response is a single step, for which they would repeat the sum; and the sum of log pi_ref,
        the control.
    """
    with_several = any(len(response.steps) > 1 for response in responses)
    with_several &= all(response.step_totals is not None for response in responses)
    return {
        place: (asdict(response.step_totals) if with_several else {"sum": response.total_reward})
        | {LIKELIHOOD: float(sum(response.ref_logp))}
        for place, response in zip(places, responses, strict=True)
    }


def generated_examples(
    generations: Sequence[dict], prompts: Dataset, tokenizer: Any
) -> tuple[list[Example], list[Place]]:
    """Makes examples of generated responses, token by token as they were generated.

    Args:
        generations: Records of generations.jsonl.
        prompts: The prompts as the model reads them.
        tokenizer: The model's.

    Returns:
        Examples with one response each, and row and rank of each.

    Raises:
        InputError: If they respond to other prompts, or were made with another tokenizer.
    """
    prompt_of_row, texts = {example.row: example for example in prompts.examples}, prompt_texts(prompts, tokenizer)
    examples, places = [], []
    for record in generations:
        if record["finish"] == DROPPED or not record["tokens"]:
            continue
        row = record["row"]
        if texts.get(row) != record["prompt"]:
            raise InputError(
                f"row {row + 1} of the generations responds to {record['prompt']!r}, and the model reads "
                f"{texts.get(row)!r} there; expected the file, the columns and the tokenizer that they were made with"
            )
        response = Response(np.array(record["tokens"], np.int32), record["finish"] == "length")
        examples.append(replace(prompt_of_row[row], responses=(response,)))
        places.append((row, record["rank"]))
    return examples, places
