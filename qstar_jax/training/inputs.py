"""The examples of a run: what it is trained on, what it is evaluated on, and what a cached reference says of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.console import say, track
from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset, load_examples
from qstar_jax.data.mismatches import with_mismatches
from qstar_jax.data.preview import preview
from qstar_jax.data.ragged import Lengths
from qstar_jax.data.table import ExampleTable
from qstar_jax.data.tokenization import Example
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.store.user_cache import user_cache
from qstar_jax.training.continuation import check_same_data, data_identity
from qstar_jax.training.guide import with_guide
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.reference import cached_logprobs
from qstar_jax.training.setup import Start

ExampleChange = Callable[[Example], Example]


@dataclass(frozen=True)
class Inputs:
    """The examples of a run, in batches.

    Attributes:
        train: Those that it is trained on.
        held_out: Those that it is evaluated on; None without any.
        identity: Which examples they are, for checkpoints.
    """

    train: Feeder
    held_out: Feeder | None
    identity: dict[str, Any]

    @property
    def prompts(self) -> Feeder:
        """Whose prompts the reference's samples respond to."""
        return self.held_out or self.train

    @property
    def date(self) -> str | None:
        """Day that chat templates took for today, if any of them printed it."""
        dates = [feeder.dataset.date for feeder in (self.train, self.held_out) if feeder and feeder.dataset.date]
        return dates[0] if dates else None


def load_inputs(
    plan: RunPlan, start: Start, mesh: Mesh, console: Console, change: ExampleChange | None = None
) -> Inputs:
    """Reads and tokenizes the examples of a run, changes them if asked to, and shows what became of their rows.

    Raises:
        InputError: If they cannot be used, or are not those with which a resumed run began.
    """
    data, options = replace(plan.config.data, date=start.date), plan.config.train
    model = {"vocabulary": start.model.config.vocab_size, "eos_ids": eos_token_ids(start), "console": console}

    def load(source: str, split: str, limit: int | None) -> Dataset:
        dataset = load_examples(source, split, plan.objective.kind, start.tokenizer, data, limit, **model)
        if change is not None:
            dataset = replace(dataset, examples=ExampleTable.of(map(change, dataset.examples)))
        if not plan.objective.mismatches:
            return dataset
        return replace(dataset, examples=with_mismatches(dataset.examples, data.max_length, source))

    examples = load(data.train, data.train_split, limit=data.max_train_rows)
    say(console, examples.report(start.model))
    first = examples.examples[0]
    console.print(preview(first, start.tokenizer, of_steps=first.row in examples.steps))
    if plan.objective.by_turns and Lengths.of(examples.examples).turns.max() < 2:
        say(console, f"note: every response of {data.train} is a single turn, on which dmpo is DPO (sigmoid)")
    train = Feeder(examples, options.batch_size, mesh, data, "train.batch_size", accumulate=options.accumulate)
    held_out = None
    if data.eval is not None:
        examples = load(data.eval, data.eval_split, limit=data.max_eval_rows)
        say(console, examples.report(start.model))
        if data.eval == data.train and (data.eval_split == data.train_split or Path(data.eval).expanduser().is_file()):
            say(console, "warning: data.eval is data.train, so no metric of this run is one of held-out rows")
        batch_size = options.eval_batch_size or options.batch_size
        held_out = Feeder(examples, batch_size, mesh, data, "train.eval_batch_size")
    identity = data_identity(train.dataset.examples, held_out and held_out.dataset.examples)
    if plan.objective.guided:
        feeders, guide = with_guide(plan, start, [train, held_out] if held_out else [train], mesh, console)
        train, held_out = (*feeders, None)[:2]
        identity["guide"] = guide.partition(" ")[0]  # the digest of its parameters
    if start.began and (note := check_same_data(plan, start.began, identity)):
        say(console, note)
    return Inputs(train, held_out, identity)


def with_cached_reference(plan: RunPlan, start: Start, inputs: Inputs, console: Console) -> Inputs:
    """Adds the reference's log-probabilities to every batch where `reference.mode` is cached.

    Raises:
        InputError: If the cache cannot be used (see `cached_logprobs`).
    """
    if plan.reference.mode != "cached":
        return inputs
    folder = Path(plan.reference.cache) if plan.reference.cache else user_cache("reference")

    def add(feeder: Feeder) -> Feeder:
        def show(batches: Iterable[Batch], description: str, total: int) -> Iterable[Batch]:
            return track(console, batches, f"{description}: {feeder.dataset.source}", total)

        logps = cached_logprobs(feeder, start.model.base, start.params, start.reference, folder, show)
        return feeder.with_reference(logps)

    return replace(inputs, train=add(inputs.train), held_out=inputs.held_out and add(inputs.held_out))
