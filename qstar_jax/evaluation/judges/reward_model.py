"""Rewards of whole responses by a model: the implicit reward of a DPO run of ours, or the score of a classifier."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from rich.console import Console

from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions
from qstar_jax.console import say, track
from qstar_jax.data.batches import Batch
from qstar_jax.data.columns import Turns
from qstar_jax.data.dropped import counted_reasons
from qstar_jax.data.loading import Dataset
from qstar_jax.data.ragged import Lengths
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import Example, tokenize
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.classifier import ClassifierReward, as_messages, is_classifier
from qstar_jax.evaluation.judges.rewards import Reward
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_tokens
from qstar_jax.sharding import use_mesh
from qstar_jax.store import hub
from qstar_jax.store.checkpoints import find_checkpoint
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.training.rl.batches import Batcher

_MULTIPLE = 64  # tokens


@dataclass(frozen=True)
class SummedReward:
    """beta * log(pi / pi_ref), summed over the tokens of a response, its EOS included.

    Lengths are rounded up to multiples of 64 tokens, so that few programs are compiled.

    Args:
        policy: The preference-trained model.
        ref_params: Parameters of its reference.
        beta: Temperature of the rewards: reward per nat.
        data: `as_chat`, `max_length` and `max_prompt_length` are read.
        batch_size: Responses scored at once; (data * fsdp) of the mesh must divide it.
        mesh: Devices of the models.
        console: Where to show progress, and counts of truncated and unreadable responses; None: nowhere.
        block: Name of its options, for errors.
    """

    policy: LoadedModel
    ref_params: Params
    beta: float
    data: DataOptions
    batch_size: int
    mesh: Mesh
    console: Console | None = None
    block: str = "judge"

    def __call__(self, pairs: Sequence[tuple[Turns, str]]) -> list[float]:
        """Scores (prompt, response) pairs; NaN where one cannot be tokenized (it has an EOS token inside, say)."""
        texts = [as_messages(*pair) if self.data.as_chat else pair for pair in pairs]
        records = [Record(prompt, (response,), row) for row, (prompt, response) in enumerate(texts)]
        model = {"vocabulary": self.policy.model.config.vocab_size, "eos_ids": eos_token_ids(self.policy)}
        examples, dropped = tokenize(
            records, self.policy.tokenizer, self.data, **model, source=f"{self.block}.model, text of"
        )
        rewards = [math.nan] * len(pairs)
        if dropped:
            say(self.console, f"no reward: {counted_reasons(dropped)}")
        if not examples:
            return rewards
        if truncated := sum(example.responses[0].truncated for example in examples):
            counts = f"{truncated} of {len(examples)} responses were truncated"
            say(self.console, f"{counts}: they exceed {self.block}.max_length")
        dataset = Dataset(examples, tuple(dropped), "judge")
        if warning := self.policy.model.check_length(dataset.longest(), f"the longest text for {self.block}.model"):
            say(self.console, warning)
        with use_mesh(self.mesh, self.policy.model.compute.dtype):
            for example, value in zip(examples, self._sums(examples), strict=True):
                rewards[example.row] = value
        return rewards

    def _sums(self, examples: Sequence[Example]) -> list[float]:
        lengths = Lengths.of(examples)
        prompts, responses = (-(-int(x.max()) // _MULTIPLE) * _MULTIPLE for x in (lengths.prompts, lengths.responses))
        size, common = self.batch_size, {"samples": 1, "max_new_tokens": responses}
        batcher = Batcher.of([prompts], "plain", self.mesh, prompts_per_part=size, **common)
        score = _compiled(self.policy.model, NamedSharding(self.mesh, PartitionSpec()))
        sums: list[float] = []
        firsts = range(0, len(examples), size)
        for first in track(self.console, firsts, "judging", len(firsts)):
            batch = batcher(part := examples[first : first + size], [e.responses for e in part], fill_to=size)
            sums += jax.device_get(score(self.policy.params, self.ref_params, batch))[: len(part), 0].tolist()
        sums = [self.beta * value for value in sums]
        if bad := [e.row for e, value in zip(examples, sums, strict=True) if not math.isfinite(value)]:
            raise InputError(
                f"{self.block}.model: the reward of text {bad[0] + 1} is not finite: check the model's weights, or "
                "compute in float32"
            )
        return sums


@cache
def _compiled(model: CausalLM, sharding: NamedSharding) -> Callable[[Params, Params, Batch], Array]:
    """The program that sums log(pi / pi_ref) over each response, kept for further calls; every host gets its result."""
    return jax.jit(
        lambda params, ref_params, batch: score_tokens(model, params, ref_params, batch).log_ratios().sum(-1),
        out_shardings=sharding,
    )


def load_reward(
    model: str,
    *,
    mesh: Mesh,
    reference: str | None = None,
    beta: float | None = None,
    data: DataOptions = DataOptions(),
    batch_size: int = 4,
    compute: ComputeOptions = ComputeOptions(),
    mesh_options: MeshOptions = MeshOptions(),
    console: Console | None = None,
    block: str = "judge",
) -> Reward:
    """Opens a reward model.

    Args:
        model: Folder of a DPO run (or another policy, with `reference` and `beta`), or folder or hub name of a
            classifier with one label.
        mesh: Devices.
        reference: Folder or hub name of the policy's reference; a DPO run carries its own.
        beta: Temperature of the rewards: reward per nat; a DPO run carries its own.
        data: `as_chat`, `max_length` and `max_prompt_length` are read.
        batch_size: Responses scored at once; (data * fsdp) of the mesh must divide it.
        compute: Dtypes.
        mesh_options: How parameters are sharded.
        console: Where to show progress, and counts of truncated and unreadable responses; None: nowhere.
        block: Name of its options, for errors.

    Returns:
        A function from (prompt, response) pairs to rewards.

    Raises:
        InputError: If the model cannot be used, or an option has no effect on it.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % parts:
        raise InputError(
            f"{block}.batch_size {batch_size} cannot be sharded evenly over {parts} devices (mesh data * fsdp); "
            f"choose a multiple of {parts}"
        )
    common = {"data": data, "batch_size": batch_size, "mesh": mesh, "console": console, "block": block}
    with use_mesh(mesh, compute.dtype):
        if find_checkpoint(Path(model).expanduser()) is None and is_classifier(folder := hub.open_folder(model)):
            given = [name for name, value in (("reference", reference), ("beta", beta)) if value is not None]
            if given:
                raise InputError(f"{block}.{given[0]} has no effect on a classifier, which {model} is; leave it out")
            return ClassifierReward.load(folder, compute, mesh_options, **common)
        load = partial(load_model, compute=compute, mesh=mesh, mesh_options=mesh_options)
        policy = load(model)
        if reference is None and policy.reference is None:
            raise InputError(
                f"{block}.model {model} is no reward model: neither a classifier (its config.json names no "
                f"...ForSequenceClassification) nor a run with a reference; name the reference by {block}.reference"
            )
        beta = find_beta(policy, beta, model, f"--{block}.beta")
        opened = open_reference(policy, reference, model, load)
        if opened.model != policy.model:
            raise InputError(
                f"{block}.reference {opened.source} and {block}.model {model} have different shapes (config.json)"
            )
    return SummedReward(policy, opened.params, beta, **common)
