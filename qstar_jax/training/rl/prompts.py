"""The prompts of a run on a reward."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rich.console import Console

from qstar_jax.console import say
from qstar_jax.data.columns import Turns
from qstar_jax.data.dialogues import plain_text
from qstar_jax.data.loading import Dataset, load_examples, read_records
from qstar_jax.data.ragged import Lengths
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.training.continuation import check_same_data, data_identity
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.rl.rewards import Guide, Reward
from qstar_jax.training.setup import Start


@dataclass(frozen=True)
class Prompts:
    """Prompts of one file, as a source of rewards sees them.

    Attributes:
        dataset: Their tokens.
        split: Split of the file.
        turns: Row -> prompt as its file has it, text or chat messages: without the chat template and the BOS token that
            the policy reads, and not truncated.
    """

    dataset: Dataset
    split: str
    turns: dict[int, Turns]

    @cached_property
    def texts(self) -> dict[int, str]:
        """Row -> prompt as plain text."""
        return {row: plain_text(turns) for row, turns in self.turns.items()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return Lengths.of(self.dataset.examples).prompts.tolist()


RewardMaker = Callable[[Prompts], Reward | None]  # None: no score


@dataclass(frozen=True)
class PromptInputs:
    """The prompts of a run.

    Attributes:
        train: Those that it is trained on.
        held_out: Those that it is evaluated on; None without any.
        identity: Which they are, for checkpoints.
    """

    train: Prompts
    held_out: Prompts | None
    identity: dict[str, Any]

    @property
    def date(self) -> str | None:
        """Day that chat templates took for today, if any of them printed it."""
        return self.train.dataset.date or (self.held_out and self.held_out.dataset.date)


def load_prompts(plan: RunPlan, start: Start, guide: Guide | None, console: Console) -> PromptInputs:
    """Reads and tokenizes the prompts of a run.

    Raises:
        InputError: If they cannot be used, or are not those with which a resumed run began.
    """
    data = replace(plan.config.data, date=start.date)
    model = {"vocabulary": start.model.config.vocab_size, "eos_ids": eos_token_ids(start), "console": console}

    def load(source: str, split: str, limit: int | None) -> Prompts:
        dataset = load_examples(source, split, "prompts", start.tokenizer, data, limit, **model)
        say(console, dataset.report(start.model, plan.config.rl.max_new_tokens))
        used = {example.row for example in dataset.examples}
        _, records, _ = read_records(source, split, "prompts", data, limit)
        return Prompts(dataset, split, {record.row: record.prompt for record in records if record.row in used})

    train = load(data.train, data.train_split, data.max_train_rows)
    held_out = None if data.eval is None else load(data.eval, data.eval_split, data.max_eval_rows)
    identity = data_identity(train.dataset.examples, held_out and held_out.dataset.examples)
    if guide is not None:
        identity["guide"] = guide.identity
    if start.began and (note := check_same_data(plan, start.began, identity)):
        say(console, note)
    return PromptInputs(train, held_out, identity)
