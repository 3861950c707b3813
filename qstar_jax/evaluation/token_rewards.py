"""The implicit reward of every action, from one pass of policy and reference."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from qstar_jax.config import DataOptions
from qstar_jax.console import say, track
from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example
from qstar_jax.errors import InputError
from qstar_jax.evaluation.partial_scores import PartialScores
from qstar_jax.evaluation.pieces import lone_piece, token_pieces
from qstar_jax.evaluation.scored import Alternative, ScoredResponse
from qstar_jax.interruption import StopSignals
from qstar_jax.mdp import TokenScores, endogenous_rewards, implicit_rewards
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import reference_entropies, response_alternatives, score_tokens
from qstar_jax.shaping import successor_values
from qstar_jax.store.open import LoadedModel

ROLES = {1: ("answer",), 2: ("chosen", "rejected")}
_COLUMNS = ("logp", "ref_logp", "reward", "q", "v", "endogenous", "entropy")


def score_dataset(
    policy: LoadedModel,
    ref_params: Params,
    dataset: Dataset,
    *,
    beta: float,
    batch_size: int,
    mesh: Mesh,
    alternatives: int = 0,
    first: int | None = None,
    entropies: bool = False,
    console: Console | None = None,
    description: str = "scoring",
    partial_scores: PartialScores | None = None,
) -> list[ScoredResponse]:
    """Scores all responses of a dataset.

    Args:
        policy: The preference-trained model.
        ref_params: Parameters of its reference.
        dataset: Prompts with one response each, or with a chosen and a rejected one.
        beta: Temperature of the rewards: reward per nat.
        batch_size: Examples scored at once; (data * fsdp) of the mesh must divide it.
        mesh: Devices of the models.
        alternatives: How many of the policy's most likely tokens to keep at each position.
        first: Keep them for the first N examples only; for all by default.
        entropies: Also compute the entropy of the reference before each token, in another pass of the reference.
        console: Where to show progress; None: nowhere.
        description: Label of the progress bar.
        partial_scores: Where scores are kept batch by batch, and those of an interrupted run are taken from.

    Returns:
        One record per response, in file order.

    Raises:
        InputError: If the batch cannot be sharded evenly over the mesh, the vocabulary is smaller than `alternatives`,
            or a number is not finite.
        Stopped: If a signal asked for it, and scores are kept batch by batch.
    """
    if not 0 <= alternatives <= policy.model.config.vocab_size:
        raise InputError(
            f"--alternatives {alternatives}: expected 0 to {policy.model.config.vocab_size}, the model's vocabulary"
        )
    feeder = Feeder(dataset, batch_size, mesh, DataOptions(), "batch_size")
    replicated = NamedSharding(mesh, PartitionSpec())  # so that every host can read the result
    score = jax.jit(partial(score_tokens, policy.model), out_shardings=replicated)
    rank = jax.jit(partial(response_alternatives, policy.model, count=alternatives), out_shardings=replicated)
    undecided = jax.jit(partial(reference_entropies, policy.model), out_shardings=replicated)
    piece = cache(partial(lone_piece, tokenizer=policy.tokenizer))
    with_alternatives = 0 if alternatives == 0 else len(dataset.examples) if first is None else first
    done, records = (0, []) if partial_scores is None else partial_scores.take(dataset.examples, batch_size)
    if partial_scores is not None and partial_scores.damage:
        say(console, f"{partial_scores.path}: {partial_scores.damage}; it is scored again from there")
    if done:
        say(console, f"{partial_scores.path} has scores of {done} of {len(dataset.examples)} examples; continuing")
    examples = iter(list(enumerate(dataset.examples))[done:])
    batches = track(console, feeder.in_order(done), description, feeder.batches - done // batch_size)
    for number, batch in enumerate(_kept(batches, records, dataset, partial_scores), start=done // batch_size):
        # One pass over the batch, and a second for alternatives where some of its examples keep them.
        scores = _columns(jax.device_get(score(policy.params, ref_params, batch)), beta)
        if entropies:
            scores["entropy"] = np.asarray(jax.device_get(undecided(policy.params, ref_params, batch)))
        ranked = None
        if number * batch_size < with_alternatives:
            ranked = jax.device_get(rank(policy.params, ref_params, batch))
        # strict=False: examples that only fill up the last batch come after the last of the dataset.
        for b, (index, example) in zip(range(batch_size), examples, strict=False):
            for r, response in enumerate(example.responses):
                tokens = (b, r, slice(len(response.ids)))
                others = ()
                if index < with_alternatives:
                    others = _alternatives([x[tokens] for x in ranked], response.action_mask, piece, beta)
                columns = {name: tuple(values[tokens].tolist()) for name, values in scores.items()}
                _check_finite(example, columns)
                if response.truncated:  # the state after it has a value, which nobody has computed
                    columns["endogenous"] = _without_last_action(columns["endogenous"], response.action_mask)
                records.append(_record(policy, example, r, beta, alternatives=others, **columns))
    return records


def unscored(policy: LoadedModel, dataset: Dataset, beta: float) -> list[ScoredResponse]:
    """The records of `score_dataset` with zeros for all numbers: what can be told of responses before that."""
    records = []
    for example in dataset.examples:
        for r, response in enumerate(example.responses):
            zeros = dict.fromkeys(_COLUMNS, (0.0,) * len(response.ids))
            records.append(_record(policy, example, r, beta, **zeros))
    return records


def _kept(
    batches: Iterable[Batch], records: list[ScoredResponse], dataset: Dataset, partial_scores: PartialScores | None
) -> Iterator[Batch]:
    """Yields batches, and keeps what has become of each; stops between two if a signal asks for it."""
    if partial_scores is None:
        yield from batches
        return
    with partial_scores, StopSignals() as stop:
        stop.defer()
        for batch in batches:
            before = len(records)
            yield batch
            partial_scores.append(records[before:])
            total = sum(len(example.responses) for example in dataset.examples)
            if stop.requested() and len(records) < total:
                raise stop.stopped(f"stopped after {len(records)} of {total} responses: {partial_scores.path}")


def _record(policy: LoadedModel, example: Example, r: int, beta: float, **columns: Any) -> ScoredResponse:
    response = example.responses[r]
    return ScoredResponse(
        row=example.row,
        role=ROLES[len(example.responses)][r],
        prompt=policy.tokenizer.decode(example.prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        pieces=token_pieces(response.ids, policy.tokenizer),
        token_ids=tuple(response.ids.tolist()),
        truncated=response.truncated,
        action_mask=tuple(response.action_mask.tolist()),
        turn=tuple(response.turns.tolist()),
        prompt_truncated=example.prompt_truncated,
        beta=beta,
        **columns,
    )


def _without_last_action(values: tuple[float, ...], action_mask: np.ndarray) -> tuple[float | None, ...]:
    last = np.flatnonzero(action_mask)[-1:]
    return tuple(None if place in last else value for place, value in enumerate(values))


def _check_finite(example: Example, scores: dict[str, tuple[float, ...]]):
    for name, values in scores.items():
        if not np.isfinite(values).all():
            token = int(np.argmin(np.isfinite(values)))
            raise InputError(
                f"row {example.row + 1}: {name} of token {token + 1} is {values[token]}; expected finite numbers: "
                "check the model's weights, or compute in float32"
            )


def _columns(scores: TokenScores, beta: float) -> dict[str, np.ndarray]:
    """The columns of scores.jsonl for each action of a batch, 0 at other tokens. Shape [B, R, T] each.

    Endogenous rewards are those of responses that ended.
    """
    q, v = scores.q(beta), scores.v(beta)
    arrays = {
        "logp": scores.logp,
        "ref_logp": scores.ref_logp,
        "reward": scores.rewards(beta),
        "q": q,
        "v": v,
        "endogenous": endogenous_rewards(q, successor_values(v, scores.mask), scores.mask),
    }
    return {name: np.asarray(values) for name, values in arrays.items()}


def _alternatives(
    ranked: list[np.ndarray], action_mask: np.ndarray, piece: Callable[[int], str], beta: float
) -> tuple[tuple[Alternative, ...], ...]:
    """Alternatives at each token of a response; none where it is no action."""
    ids, logp, ref_logp = ranked
    rewards = implicit_rewards(logp, ref_logp, beta=beta)
    places: list[tuple[Alternative, ...]] = [()] * len(action_mask)
    for t in np.flatnonzero(action_mask):
        numbers = zip(ids[t].tolist(), logp[t].tolist(), rewards[t].tolist(), strict=True)
        places[t] = tuple(Alternative(piece(token), *values) for token, *values in numbers)
    return tuple(places)
