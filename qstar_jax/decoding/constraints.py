"""Rules that change scores by the text so far: repetitions, and a minimum length."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Constraints:
    """The rules. Scores are not normalised again after they changed, as in transformers.

    Attributes:
        min_new_tokens: No EOS before a response has this many tokens.
        repetition_penalty: Divides the positive scores of tokens that occur in the prompt or the response, and
            multiplies the negative ones; 1 for none (arXiv 1909.05858). Searches and sampling both apply it to
            log-probabilities.
        no_repeat_ngram_size: No sequence of this many tokens occurs twice in prompt and response; 0 for no rule.
    """

    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self):
        """Checks the numbers."""
        if self.min_new_tokens < 0 or self.no_repeat_ngram_size < 0 or not self.repetition_penalty > 0:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} and no_repeat_ngram_size {self.no_repeat_ngram_size} must be at "
                f"least 0, repetition_penalty {self.repetition_penalty} above 0"
            )

    @property
    def read_history(self) -> bool:
        """Whether a rule looks at the text so far."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0

    def apply(
        self,
        scores: Float[Array, "B K V"],
        history: Int[Array, "B K T"],
        lengths: Int[Array, "B K"] | Int[Array, ""],
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, " B"],
        eos_ids: tuple[int, ...],
    ) -> Float[Array, "B K V"]:
        """Changes the scores of the next token.

        Args:
            scores: Scores of every token. Shape [B, K, V].
            history: Tokens of each response, from slot 0. Shape [B, K, T].
            lengths: Number of these tokens. Shape [B, K], or one number for all.
            prompts: Right-padded token ids. Shape [B, P].
            prompt_lengths: Tokens of each prompt. Shape [B].
            eos_ids: Tokens that end a response.
        """
        if self.min_new_tokens and eos_ids:
            early = jnp.broadcast_to(lengths, scores.shape[:2])[..., None] < self.min_new_tokens
            is_eos = jnp.zeros(scores.shape[-1], bool).at[jnp.array(eos_ids)].set(True)
            scores = jnp.where(early & is_eos, -jnp.inf, scores)
        if not self.read_history:
            return scores
        text, length = _texts(history, lengths, prompts, prompt_lengths)
        if self.repetition_penalty != 1.0:
            seen = _marks(text, jnp.arange(text.shape[-1]) < length[..., None], scores.shape[-1])
            penalised = jnp.where(scores > 0, scores / self.repetition_penalty, scores * self.repetition_penalty)
            scores = jnp.where(seen, penalised, scores)
        if self.no_repeat_ngram_size:
            scores = jnp.where(_repeating(text, length, self.no_repeat_ngram_size, scores.shape[-1]), -jnp.inf, scores)
        return scores


def _texts(history: Array, lengths: Array, prompts: Array, prompt_lengths: Array) -> tuple[Array, Array]:
    """Prompt and response without the gap between them [B, K, P + T], and their lengths [B, K]."""
    width, max_new_tokens = prompts.shape[1], history.shape[-1]
    rows, paths = history.shape[:2]
    slot = jnp.arange(width + max_new_tokens)
    after = slot - prompt_lengths[:, None, None]
    joined = jnp.concatenate([jnp.broadcast_to(prompts[:, None], (rows, paths, width)), history], axis=-1)
    index = jnp.where(after < 0, slot, width + jnp.clip(after, 0, max_new_tokens - 1))
    text = jnp.take_along_axis(joined, jnp.broadcast_to(index, joined.shape), axis=-1)
    return text, jnp.broadcast_to(prompt_lengths[:, None] + lengths, (rows, paths))


def _marks(tokens: Array, valid: Array, vocabulary: int) -> Array:
    """[B, K, S] tokens -> [B, K, V], True at tokens that are among the valid ones."""
    rows, paths, _ = tokens.shape
    b, k = jnp.arange(rows)[:, None, None], jnp.arange(paths)[:, None]
    # Invalid entries go to a token past the vocabulary, which is left out at the end.
    return (
        jnp.zeros((rows, paths, vocabulary + 1), bool)
        .at[b, k, jnp.where(valid, tokens, vocabulary)]
        .set(True)[..., :-1]
    )


def _repeating(text: Array, length: Array, size: int, vocabulary: int) -> Array:
    """[B, K, V], True at tokens that would complete a sequence of `size` tokens for the second time."""
    span = text.shape[-1]
    starts = jnp.arange(span)
    same = starts + size - 1 < length[..., None]  # the earlier sequence lies wholly in the text
    for i in range(size - 1):
        last = jnp.take_along_axis(text, jnp.maximum(length - (size - 1) + i, 0)[..., None], axis=-1)
        same &= jnp.roll(text, -i, axis=-1) == last
    same &= length[..., None] >= size - 1
    return _marks(jnp.roll(text, -(size - 1), axis=-1), same, vocabulary)
