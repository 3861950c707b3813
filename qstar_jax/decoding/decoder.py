"""Decodes batches of prompts, by the method that a `decode:` block selects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from qstar_jax.data.tokenization import check_vocabulary
from qstar_jax.decoding.best_of_n import best_of_n
from qstar_jax.decoding.objectives import Objective
from qstar_jax.decoding.options import DecodePlan
from qstar_jax.decoding.policies import Policy
from qstar_jax.decoding.responses import Finish, Responses
from qstar_jax.decoding.sampler import sample
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.chunks import chunk_beam_search
from qstar_jax.decoding.search.exact import exact_search
from qstar_jax.decoding.search.mcts import mcts
from qstar_jax.decoding.stop_strings import StopStrings, text_before_stop
from qstar_jax.mdp import implicit_rewards

WIDTH = 64  # prompts are padded to multiples of this many tokens


@dataclass(frozen=True)
class Generation:
    """One response, as generations.jsonl records it.

    Attributes:
        text: Its text without special tokens, truncated before a stop string.
        tokens: Its token ids, EOS and stop string included.
        length: Number of its tokens.
        logp: Sum of log pi over its tokens, in nats; under the guided policy if pairs of models guide it.
        ref_logp: The same under the reference, or under the unguided model; None without one.
        reward: Implicit reward beta * (logp - ref_logp); None without a reference.
        score: What the search maximizes.
        finish: eos, length or stop; none if the method found no response.
        certified: Whether it is proven to be the best of all; None if nothing can be proven.
        seed: Seed of the sampling; None if nothing was sampled.
        drawn: Tokens drawn for its prompt in all, those of other and of pruned responses included; None where the
            method draws none.
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
    drawn: int | None

    @property
    def finished(self) -> bool:
        """Whether it ended by itself, not at the limit."""
        return self.finish in ("eos", "stop")


@dataclass(frozen=True)
class Decoder:
    """A function of batches of prompts, with all that stays the same between them. `prepare` makes it.

    Attributes:
        model: The policy, or an `Ensemble` of it and the models that run beside it.
        params: Parameters, stacked or not.
        tokenizer: The policy's tokenizer.
        plan: The `decode:` block, interpreted.
        objective: What the method maximizes.
        beta: Temperature of the reported rewards: reward per nat; None without a reference.
        stop_strings: Strings that end a response.
        vocabulary: Number of tokens that all models know.
        mesh: Devices of the models.
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

    def __call__(
        self, prompts: Sequence[np.ndarray], rows: Sequence[int] | None = None, *, fill_to: int = 0
    ) -> list[list[Generation]]:
        """Decodes one batch of prompts.

        The first call with a new number of prompts, or with longer prompts (in steps of 64 tokens), compiles.

        Args:
            prompts: Token ids of each prompt, at least one each.
            rows: Number of each prompt, from which its key is derived, so that responses do not depend on the batch. By
                default they are counted from 0.
            fill_to: Pad the batch to this many prompts, so that the last batch runs the program of full ones.

        Returns:
            Responses to each prompt, best first after a search; at least one, whose finish may be "none".

        Raises:
            InputError: If a prompt has a token that one of the models does not know.
        """
        count = len(prompts)
        rows = list(range(count)) if rows is None else list(rows)
        missing = max(fill_to - count, 0) if self.plan.batched else 0
        # Pad the batch, and derive a key from each row.
        padded, lengths = self._pad([*prompts, *prompts[:1] * missing])
        key = jax.random.key(self.plan.block.seed or 0)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.array(rows + rows[:1] * missing))
        # Replicate: prompts are few, and beams of one prompt belong together.
        padded, lengths, keys = jax.device_put((padded, lengths, keys), NamedSharding(self.mesh, PartitionSpec()))
        if self.plan.batched:
            parts = [self.search(padded, lengths, keys)]
        else:
            parts = [self.search(padded[i : i + 1], lengths[i : i + 1], keys[i : i + 1]) for i in range(count)]
        return [responses for part in jax.device_get(parts) for responses in self._generations(part)][:count]

    def _pad(self, prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        padded = np.zeros((len(prompts), -(-int(lengths.max()) // WIDTH) * WIDTH), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        check_vocabulary(padded, self.vocabulary, self.tokenizer, "a prompt", "one of the models")
        return padded, lengths

    def search(self, prompts: Int[Array, "B P"], lengths: Int[Array, " B"], keys: Key[Array, " B"]) -> Responses:
        """Runs the method on padded prompts; on a single one, unless they are `batched`."""
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
                return mcts(*common, options, key=None if self.plan.batched else keys[0], **shared)[0]
            case "exact":
                return exact_search(self.model, self.params, prompts[0, : int(lengths[0])], **vars(options), **shared)
        return beam_search(*common, options, key=None if self.plan.batched else keys[0], **stopping)

    def _generations(self, responses: Responses) -> list[list[Generation]]:
        count, width = responses.logp.shape
        ranks = range(min(self.plan.block.return_sequences or 1, width))
        ranked = [[self._generation(responses, i, rank) for rank in ranks] for i in range(count)]
        return [[one for one in several if one.finish != "none"] or several[:1] for several in ranked]

    def _generation(self, responses: Responses, i: int, rank: int) -> Generation:
        tokens = tuple(responses.tokens[i, rank, : responses.lengths[i, rank]].tolist())
        finish = Finish(int(responses.finish[i, rank]))
        logp = _finite(responses.logp[i, rank])
        ref_logp = None if responses.ref_logp is None else _finite(responses.ref_logp[i, rank])
        reward = None
        if self.beta is not None and logp is not None and ref_logp is not None:
            reward = implicit_rewards(logp, ref_logp, beta=self.beta)
        return Generation(
            text=self._text(tokens, finish),
            tokens=tokens,
            length=len(tokens),
            logp=logp,
            ref_logp=ref_logp,
            reward=reward,
            score=_finite(responses.score[i, rank]),
            finish="none" if finish == Finish.INVALID else finish.name.lower(),
            certified=bool(responses.certified[i]) if responses.certified is not None and rank == 0 else None,
            seed=self.plan.block.seed if self.plan.samples else None,
            drawn=None if responses.drawn is None else int(responses.drawn[i]),
        )

    def _text(self, tokens: tuple[int, ...], finish: Finish) -> str:
        if finish == Finish.STOP:
            return text_before_stop(self.plan.block.stop, tokens, self.tokenizer)
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _finite(x: np.generic) -> float | None:
    """A number for JSON, which has no infinities."""
    return float(x) if math.isfinite(x) else None
