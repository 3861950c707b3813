"""The batches of a run on a reward: samples of the policy, made on the spot."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qstar_jax.data.batches import Batch, step_indices
from qstar_jax.data.loading import Dataset
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError
from qstar_jax.training.rl.batches import Batcher
from qstar_jax.training.rl.rewards import Reward
from qstar_jax.training.rl.sampling import PolicySampler, sample_keys
from qstar_jax.training.source import Source, name_rows
from qstar_jax.training.step import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scorer:
    """Scores samples: token ids in, scores out.

    Attributes:
        source: Name of the file of prompts, for errors.
        texts: Row of the file -> prompt as plain text.
        tokenizer: Spells responses.
        reward: Scores (prompt, response) pairs; None: every score is 0.
        missing_eos_penalty: Subtracted where a response reached the limit.
    """

    source: str
    texts: Mapping[int, str]
    tokenizer: "PreTrainedTokenizerBase"
    reward: Reward | None
    missing_eos_penalty: float = 0.0

    def __call__(self, examples: Sequence[Example], responses: Sequence[tuple[Response, ...]]) -> np.ndarray:
        """Returns the score of each response, [B, N] float32.

        Raises:
            InputError: If one has no score, or not a finite one.
        """
        shape = len(responses), len(responses[0])
        truncated = np.array([[one.truncated for one in several] for several in responses])
        if self.reward is None:
            return (-self.missing_eos_penalty * truncated).astype(np.float32)
        pairs = [
            (self.texts[example.row], self._spell(response))
            for example, several in zip(examples, responses, strict=True)
            for response in several
        ]
        values = [math.nan if score is None else score for score in self.reward(pairs)]
        if len(values) != len(pairs):
            raise InputError(f"{self.source}: {len(values)} rewards of {len(pairs)} responses; expected one each")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
            scores = np.array(values, np.float32)
        if bad := np.flatnonzero(~np.isfinite(scores)).tolist():
            (prompt, response), row = pairs[bad[0]], examples[bad[0] // shape[1]].row
            raise InputError(
                f"{self.source} row {row + 1}: the reward of the response {response[:200]!r} to the prompt "
                f"{prompt[-200:]!r} is {values[bad[0]]}; expected a number for every response, finite in float32: use "
                "prompts that the source of rewards knows, or another reward.kind"
            )
        return scores.reshape(shape) - self.missing_eos_penalty * truncated.astype(np.float32)

    def _spell(self, response: Response) -> str:
        """Spells a response as `qstar generate` does: without special tokens."""
        ids = response.ids.tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass
class Clock:
    """Seconds that parts of the steps took since it was read; the first step of a process compiles and is left out."""

    seconds: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    steps: int = 0
    is_warm: bool = False

    def add(self, part: str, began: float) -> float:
        """Adds the time since `began` to a part; returns the time."""
        now = time.perf_counter()
        if self.is_warm:
            self.seconds[part] = self.seconds.get(part, 0.0) + now - began
        return now

    def end_step(self, samples: int):
        """Counts a step and its samples."""
        if self.is_warm:
            self.samples, self.steps = self.samples + samples, self.steps + 1
        self.is_warm = True

    def read(self) -> dict[str, float]:
        """Returns mean seconds per step of each part, and samples per second of sampling, and starts anew."""
        metrics = {f"perf/{part}_seconds": seconds / self.steps for part, seconds in self.seconds.items()}
        if self.seconds:
            metrics["perf/samples_per_second"] = self.samples / self.seconds["sampling"]
        self.seconds, self.samples, self.steps = {}, 0, 0
        return metrics


@dataclass(frozen=True)
class SampleSource(Source):
    """Samples of the policy to the prompts of a step, with what they earn.

    The prompts are a function of (seed, step), and so are the keys that samples are drawn with; the rest is the policy.

    Attributes:
        dataset: The prompts.
        seed: Fixes their order and the samples.
        batch_size: Prompts per step.
        sampler: Draws the responses.
        scorer: Scores them.
        batcher: Puts them on the devices.
        assess: Adds what they earn (see `rewards.Assessor`).
        clock: Where the time goes.
    """

    dataset: Dataset
    seed: int
    batch_size: int
    sampler: PolicySampler
    scorer: Scorer
    batcher: Batcher
    assess: Callable[..., Batch]
    clock: Clock = field(default_factory=Clock)

    @property
    def name(self) -> str:
        """File or dataset of the hub."""
        return self.dataset.source

    def _examples(self, step: int) -> list[Example]:
        indices = step_indices(self.seed, step, len(self.dataset.examples), self.batch_size)
        return [self.dataset.examples[int(i)] for i in indices]

    def at_step(self, step: int, state: TrainState) -> Batch:
        """Draws and scores the samples of a step."""
        examples, now = self._examples(step), time.perf_counter()
        samples = self.sampler(state.policy, examples, sample_keys(self.seed, step, self.batch_size))
        now = self.clock.add("sampling", now)
        scores = self.scorer(examples, samples.responses)
        self.clock.add("reward", now)
        self.clock.end_step(scores.size)
        batch = self.batcher(examples, samples.responses)
        return self.assess(state.policy, state.ref_params, batch, scores, samples.logp)

    def epochs(self, steps: int) -> float:
        """Passes over the prompts after some steps."""
        return steps * self.batch_size / len(self.dataset.examples)

    def locate(self, step: int, examples: Sequence[int]) -> str:
        """Names rows of the file, counted from 1."""
        rows = self._examples(step)
        return name_rows([rows[i].row for i in examples])
