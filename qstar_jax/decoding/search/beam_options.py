"""The semantics of beam search: its options, and presets that match other libraries."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from qstar_jax.decoding.arguments import token_id_tuple
from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.objectives import Likelihood, Objective


@dataclass(frozen=True)
class BeamOptions:
    """Semantics of beam search; programs differ in all of them, and these defaults find the highest scores.

    Attributes:
        beams: Width of the search, K.
        max_new_tokens: Longest response T, EOS included.
        eos_ids: Tokens that end a response; kept as a tuple.
        eos_rule: Which ends of responses are kept. `all`: all of them. `hf`, `t5x`: those among the K or 2K best
            candidates of a step, unfinished ones included.
        length_rule: What a sum is divided by before responses are compared. `none`: nothing. `hf`:
            length ** length_penalty. `gnmt`: ((5 + length) / 6) ** length_penalty (arXiv 1609.08144). Lengths count
            EOS.
        length_penalty: Exponent of the rule; above 0 it favours long responses.
        count_prompt: Whether lengths count the prompt too, as T5X does.
        early_stopping: When the search of a prompt is over. "never": when no live beam can become better than the worst
            of K finished responses. False: when none is better at its present length. True: also when K responses have
            finished; this needs an EOS rule under which not every beam can finish.
        truncated: Whether responses that reach the limit `compete` with finished ones, or are used only where a prompt
            has no finished one (`drop`).
        constraints: Rules on repetition and minimum length.
        groups: Diverse beam search: number of groups of beams, each of which avoids the tokens of earlier groups.
        diversity: Cost of a token for each beam of an earlier group that has it at the same step, in nats; it counts in
            the choice alone, not in the score (arXiv 1610.02424).
        stochastic: Stochastic beam search: K responses drawn without replacement from the policy (arXiv 1903.06059);
            the score is the perturbed log-probability.
    """

    beams: int
    max_new_tokens: int
    eos_ids: Sequence[int]
    eos_rule: Literal["all", "hf", "t5x"] = "all"
    length_rule: Literal["none", "hf", "gnmt"] = "none"
    length_penalty: float = 0.0
    count_prompt: bool = False
    early_stopping: bool | Literal["never"] = "never"
    truncated: Literal["compete", "drop"] = "compete"
    constraints: Constraints = Constraints()
    groups: int = 1
    diversity: float = 0.0
    stochastic: bool = False

    def __post_init__(self):
        """Refuses values that have no meaning or no effect."""
        object.__setattr__(self, "eos_ids", token_id_tuple("eos_ids", self.eos_ids))
        message = None
        if self.beams < 1 or self.max_new_tokens < 1 or self.groups < 1:
            message = f"beams {self.beams}, max_new_tokens {self.max_new_tokens}, groups {self.groups}: at least 1 each"
        elif self.beams % self.groups:
            message = f"beams {self.beams} cannot be split into {self.groups} groups of equal size"
        elif (self.groups > 1) != (self.diversity > 0):
            message = f"groups {self.groups} with diversity {self.diversity}: set groups above 1 and diversity above 0"
        elif self.length_rule == "none" and (self.length_penalty or self.count_prompt):
            message = f"length_penalty {self.length_penalty} has no effect with length_rule none; choose hf or gnmt"
        elif self.length_rule != "none" and not self.length_penalty:
            message = f"length_rule {self.length_rule} has no effect with length_penalty 0; choose none, or a penalty"
        elif self.early_stopping is True and self.eos_rule == "all":
            message = "early_stopping True with eos_rule all would stop at once: every beam could end; choose hf or t5x"
        elif self.stochastic and replace(self, stochastic=False) != _plain(self):
            message = "stochastic beams are a sample, which no groups, rules, constraints or early stopping may change"
        elif self.constraints.min_new_tokens > self.max_new_tokens:
            message = f"min_new_tokens {self.constraints.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
        if message:
            raise ValueError(message)

    def normalised(self, score: Array, length: Array | int, prompt_lengths: Int[Array, " B"]) -> Array:
        """Divides scores [B, ...] of responses of `length` tokens by the length rule."""
        if self.length_rule == "none":
            return score
        if self.count_prompt:
            length = length + prompt_lengths.reshape(-1, *[1] * (score.ndim - 1))
        length = jnp.asarray(length, score.dtype)
        base = length if self.length_rule == "hf" else (5 + length) / 6
        return score / base**self.length_penalty


def _plain(options: BeamOptions) -> BeamOptions:
    """Beams of the same size without any rule."""
    return BeamOptions(options.beams, options.max_new_tokens, options.eos_ids)


def check_objective(options: BeamOptions, objective: Objective):
    """Refuses options that have no meaning under an objective.

    Raises:
        ValueError: If they do not go together.
    """
    name = type(objective).__name__
    if options.length_rule != "none" and not objective.comparable_across_lengths:
        raise ValueError(
            f"length_rule {options.length_rule!r} with {name}: a search for reward and one for likelihood differ by a "
            "constant, which is no longer one when divided by lengths; use length_rule 'none'"
        )
    penalty = options.constraints.repetition_penalty
    if penalty != 1 and not objective.comparable_across_lengths:
        raise ValueError(
            f"repetition_penalty {penalty} with {name}: it scales log-probabilities, and a reward near 0 would be no "
            "worse for it; use no_repeat_ngram_size"
        )
    if options.stochastic and not isinstance(objective, Likelihood):
        raise ValueError(f"stochastic beams draw from a policy, so their objective is Likelihood, not {name}")


def hf_compat(
    beams: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    *,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    constraints: Constraints = Constraints(),
) -> BeamOptions:
    """Options under which beam search is `generate(num_beams=...)` of transformers 5, with its defaults."""
    return BeamOptions(
        beams,
        max_new_tokens,
        eos_ids,
        eos_rule="hf",
        length_rule="hf" if length_penalty else "none",
        length_penalty=length_penalty,
        early_stopping=early_stopping if beams > 1 else True,  # one beam is greedy decoding there, which ends once
        constraints=constraints,
    )


def t5x_compat(beams: int, max_new_tokens: int, eos_id: int, *, alpha: float = 0.6) -> BeamOptions:
    """Options under which it is T5X's `beam_search`, with its default, except for EOS in prompts."""
    return BeamOptions(
        beams,
        max_new_tokens,
        (eos_id,),
        eos_rule="t5x",
        length_rule="gnmt" if alpha else "none",
        length_penalty=alpha,
        count_prompt=bool(alpha),
        truncated="drop",
    )
