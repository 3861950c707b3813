"""From batches of prompts to answers, by the method that a `decode:` block names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from qstar_jax.data.tokenization import check_known
from qstar_jax.decoding.best_of_n import best_of_n
from qstar_jax.decoding.objectives import Objective
from qstar_jax.decoding.options import DecodePlan
from qstar_jax.decoding.policies import Policy
from qstar_jax.decoding.responses import Finish, Responses
from qstar_jax.decoding.sampling import sample
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.chunks import chunk_beam_search
from qstar_jax.decoding.search.exact import exact_search
from qstar_jax.decoding.search.mcts import mcts
from qstar_jax.decoding.stop_strings import StopStrings, text_before_stop

WIDTH = 64  # prompts are padded to multiples of so many tokens


@dataclass(frozen=True)
class Generation:
    """One response, as generations.jsonl records it.

    Attributes:
        text: Its text without special tokens, cut before a stop string.
        tokens: Its token ids, EOS and stop string included.
        length: How many.
        logp: Sum of log pi over these tokens, in nats; of the guided policy where pairs of models guide it.
        ref_logp: The same under the reference, or under the unguided model; None without one.
        reward: Implicit reward beta * (logp - ref_logp); None without a reference.
        score: What was compared.
        finish: eos, length, stop; none where the method has found no answer.
        certified: Whether it is proven to be the best of all; None where nothing can be proven.
        seed: Seed of what was drawn; None where nothing was.
    """

    text: str
    tokens: tuple[int, ...]
    length: int
    logp: float | None
    ref_logp: float | None
    reward: float | None
    score: float | None
    finish: str
    certified: bool | None
    seed: int | None

    @property
    def finished(self) -> bool:
        """Whether it came to its own end."""
        return self.finish in ("eos", "stop")


@dataclass(frozen=True)
class Decoder:
    """Everything that stays the same from batch to batch. `prepare` makes it.

    Attributes:
        model: The policy, or an `Ensemble` of it and what else is run.
        params: Parameters, stacked or not.
        tokenizer: The policy's tokenizer.
        plan: What the `decode:` block means.
        objective: What is added up.
        beta: Of the rewards that are reported, if there is a reference.
        stop_strings: Strings that end an answer.
        vocabulary: Tokens that all models know.
        mesh: Devices.
    """

    model: Policy
    params: Any
    tokenizer: Any
    plan: DecodePlan
    objective: Objective
    beta: float | None
    stop_strings: StopStrings | None
    vocabulary: int
    mesh: Mesh

    @property
    def batched(self) -> bool:
        """Whether prompts are decoded side by side; where one key serves a whole batch, they are not."""
        method = self.plan.block.method
        has_one_key = method in ("beam", "mcts") and self.plan.samples
        return not has_one_key and method != "exact"

    def __call__(
        self, prompts: Sequence[np.ndarray], rows: Sequence[int] | None = None, *, fill_to: int = 0
    ) -> list[list[Generation]]:
        """Decodes one batch of prompts.

        The first call with a number of prompts, or with longer ones (in steps of 64 tokens), compiles.

        Args:
            prompts: Token ids of each prompt, at least one each.
            rows: A number of each prompt, from which its key is made: answers do not depend on the batch. By default
                they are counted from 0.
            fill_to: Compute as many rows as this, so that the program of full batches serves the last one too.

        Returns:
            Answers to each prompt, the best first where there is a search; at least one, if only to say "none".

        Raises:
            InputError: If a prompt has a token that one of the models does not know.
        """
        count = len(prompts)
        rows = list(range(count)) if rows is None else list(rows)
        missing = max(fill_to - count, 0) if self.batched else 0
        padded, lengths = self._padded([*prompts, *prompts[:1] * missing])
        key = jax.random.key(self.plan.block.seed or 0)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.array(rows + rows[:1] * missing))
        # Replicated: rows are few, and beams of one prompt belong together.
        padded, lengths, keys = jax.device_put((padded, lengths, keys), NamedSharding(self.mesh, PartitionSpec()))
        if self.batched:
            found = [self._search(padded, lengths, keys)]
        else:
            found = [self._search(padded[i : i + 1], lengths[i : i + 1], keys[i : i + 1]) for i in range(count)]
        return [answers for part in jax.device_get(found) for answers in self._answers(part)][:count]

    def _padded(self, prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        padded = np.zeros((len(prompts), -(-int(lengths.max()) // WIDTH) * WIDTH), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        check_known(padded, self.vocabulary, self.tokenizer, "a prompt", "one of the models")
        return padded, lengths

    def _search(self, prompts: Int[Array, "B P"], lengths: Int[Array, " B"], keys: Key[Array, " B"]) -> Responses:
        common = (self.model, self.params, prompts, lengths)
        shared = {"objective": self.objective}
        stopping = shared | {"stop_strings": self.stop_strings}
        plan, options = self.plan, self.plan.method
        match plan.block.method:
            case "greedy" | "sample":
                return sample(*common, keys if plan.samples else None, options, **stopping)
            case "best_of_n":
                return best_of_n(*common, keys, options, rejection=plan.rejection, **stopping)
            case "chunk":
                return chunk_beam_search(*common, keys, options, **stopping)
            case "mcts":
                return mcts(*common, options, key=None if self.batched else keys[0], **shared)[0]
            case "exact":
                return exact_search(self.model, self.params, prompts[0, : int(lengths[0])], **vars(options), **shared)
        return beam_search(*common, options, key=None if self.batched else keys[0], **stopping)

    def _answers(self, found: Responses) -> list[list[Generation]]:
        rows, width = found.logp.shape
        ranks = range(min(self.plan.block.return_sequences or 1, width))
        answers = [[self._answer(found, row, rank) for rank in ranks] for row in range(rows)]
        return [[a for a in several if a.finish != "none"] or several[:1] for several in answers]

    def _answer(self, found: Responses, row: int, rank: int) -> Generation:
        tokens = tuple(found.tokens[row, rank, : found.lengths[row, rank]].tolist())
        finish = Finish(int(found.finish[row, rank]))
        logp = _number(found.logp[row, rank])
        ref_logp = None if found.ref_logp is None else _number(found.ref_logp[row, rank])
        reward = None
        if self.beta is not None and logp is not None and ref_logp is not None:
            reward = self.beta * (logp - ref_logp)
        return Generation(
            text=self._text(tokens, finish),
            tokens=tokens,
            length=len(tokens),
            logp=logp,
            ref_logp=ref_logp,
            reward=reward,
            score=_number(found.score[row, rank]),
            finish="none" if finish == Finish.INVALID else finish.name.lower(),
            certified=bool(found.certified[row]) if found.certified is not None and rank == 0 else None,
            seed=self.plan.block.seed if self.plan.samples else None,
        )

    def _text(self, tokens: tuple[int, ...], finish: Finish) -> str:
        if finish == Finish.STOP:
            return text_before_stop(self.plan.block.stop, tokens, self.tokenizer)
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _number(x: np.generic) -> float | None:
    """A number as JSON knows them."""
    return float(x) if math.isfinite(x) else None
