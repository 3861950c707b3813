"""The implicit reward of every token of every answer, from one pass of policy and reference."""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax import mdp
from qstar_jax.config import DataOptions
from qstar_jax.data.batches import Batch
from qstar_jax.data.loading import Dataset
from qstar_jax.evaluation.scored import ScoredResponse, token_pieces
from qstar_jax.loading import LoadedModel
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_tokens
from qstar_jax.training.feeding import Feeder

ROLES = {1: ("answer",), 2: ("chosen", "rejected")}


def score_dataset(
    policy: LoadedModel,
    ref_params: Params,
    dataset: Dataset,
    *,
    beta: float,
    batch_size: int,
    mesh: Mesh,
    track: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
) -> list[ScoredResponse]:
    """Scores all answers of a data set.

    Args:
        policy: The preference-trained model.
        ref_params: Parameters of its reference.
        dataset: Prompts with one answer each, or with a chosen and a rejected one.
        beta: Temperature of the rewards.
        batch_size: Rows of the data set scored at once; (data * fsdp) of the mesh must divide it.
        mesh: Devices of the models.
        track: Wraps the batches, for a progress bar.

    Returns:
        One record an answer, in file order.

    Raises:
        InputError: If the batch cannot be cut evenly over the mesh.
    """
    feeder = Feeder(dataset, batch_size, mesh, DataOptions(), policy.tokenizer.pad_token_id or 0, "batch_size")
    replicated = NamedSharding(mesh, PartitionSpec())  # so that every host can read the result
    score = jax.jit(partial(score_tokens, policy.model), out_shardings=replicated)
    examples = iter(dataset.examples)
    records: list[ScoredResponse] = []
    for batch in track(feeder.in_order()):
        scores = jax.device_get(score(policy.params, ref_params, batch))
        # strict=False: the rows that only fill up the last batch come after the last example
        for b, example in zip(range(batch_size), examples, strict=False):
            prompt = policy.tokenizer.decode(example.prompt, skip_special_tokens=False)
            for r, response in enumerate(example.responses):
                own = jax.tree.map(lambda x, at=(b, r, slice(len(response.ids))): x[at], scores)
                records.append(
                    ScoredResponse(
                        row=example.row,
                        role=ROLES[len(example.responses)][r],
                        prompt=prompt,
                        pieces=token_pieces(response.ids, policy.tokenizer),
                        token_ids=tuple(response.ids.tolist()),
                        truncated=response.truncated,
                        beta=beta,
                        **_numbers(own, beta),
                    )
                )
    return records


def _numbers(scores: mdp.TokenScores, beta: float) -> dict[str, tuple[float, ...]]:
    everywhere = np.ones(scores.logp.shape, bool)
    arrays = {
        "logp": scores.logp,
        "ref_logp": scores.ref_logp,
        "reward": mdp.implicit_rewards(scores.logp, scores.ref_logp, everywhere, beta=beta),
        "q": mdp.q_values(scores.logp, scores.logz, everywhere, beta=beta),
        "v": mdp.state_values(scores.logz, everywhere, beta=beta),
    }
    return {name: tuple(np.asarray(values).tolist()) for name, values in arrays.items()}
