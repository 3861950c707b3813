"""What beam search means: its options, and those of other programs."""

from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.objectives import Likelihood, Objective


@dataclass(frozen=True)
class BeamOptions:
    """What "beam search" means; programs differ in all of it, and the defaults here search best.

    Attributes:
        beams: Width of the search, K.
        max_new_tokens: Longest answer T, EOS included.
        eos_ids: Tokens that end an answer.
        eos_rule: Which ends of answers are kept: `all`; those among the `hf` K or `t5x` 2K best candidates of a step,
            unfinished ones counted too.
        length_rule: What a sum is divided by to compare answers: nothing; `hf`: length ** length_penalty; `gnmt`:
            ((5 + length) / 6) ** length_penalty (arXiv 1609.08144). Lengths count EOS.
        length_penalty: Exponent of the rule; above 0 favours long answers.
        count_prompt: Whether lengths count the prompt too, as T5X does.
        early_stopping: When a row is done. "never": when no unfinished answer can become better than the worst of K
            finished ones. False: when none is better at its present length. True: also when K answers are finished;
            this needs an EOS rule under which not every beam can finish one.
        truncated: Whether answers that run into the limit `compete` with finished ones, or are used only where a row
            has no finished one (`drop`).
        constraints: Repetition and shortest length.
        groups: Diverse beam search: beams are split into so many groups, each avoiding what earlier ones say.
        diversity: What a token costs a beam for each beam of an earlier group that says it at the same step, in nats;
            it counts for the choice alone, not in the score (arXiv 1610.02424).
        stochastic: Stochastic beam search: K answers drawn without replacement from the policy (arXiv 1903.06059); the
            score is the perturbed log-probability.
    """

    beams: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]
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
        """Refuses what has no meaning or would have no effect."""
        wrong = None
        if self.beams < 1 or self.max_new_tokens < 1 or self.groups < 1:
            wrong = f"beams {self.beams}, max_new_tokens {self.max_new_tokens}, groups {self.groups}: at least 1 each"
        elif self.beams % self.groups:
            wrong = f"beams {self.beams} cannot be split into {self.groups} groups of one size"
        elif (self.groups > 1) != (self.diversity > 0):
            wrong = f"groups {self.groups} with diversity {self.diversity}: set groups above 1 and diversity above 0"
        elif self.length_rule == "none" and (self.length_penalty or self.count_prompt):
            wrong = f"length_penalty {self.length_penalty} has no effect with length_rule none; choose hf or gnmt"
        elif self.length_rule != "none" and not self.length_penalty:
            wrong = f"length_rule {self.length_rule} has no effect with length_penalty 0; choose none, or a penalty"
        elif self.early_stopping is True and self.eos_rule == "all":
            wrong = "early_stopping True with eos_rule all would stop at once: every beam could end; choose hf or t5x"
        elif self.stochastic and replace(self, stochastic=False) != _plain(self):
            wrong = "stochastic beams are a sample, which no groups, rules, constraints or early stopping may change"
        elif self.constraints.min_new_tokens > self.max_new_tokens:
            wrong = f"min_new_tokens {self.constraints.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
        elif any(eos < 0 for eos in self.eos_ids):
            wrong = f"eos_ids {self.eos_ids} are token ids, from 0 on"
        if wrong:
            raise ValueError(wrong)

    def normalised(self, score: Array, length: Array | int, prompt_lengths: Int[Array, " B"]) -> Array:
        """Divides sums [B, ...] of answers of `length` new tokens as the length rule says."""
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

    Args:
        options: Options of a search.
        objective: What it adds up.

    Raises:
        ValueError: If they do not go together.
    """
    name = type(objective).__name__
    if options.length_rule != "none" and not objective.comparable_across_lengths:
        raise ValueError(
            f"length_rule {options.length_rule!r} with {name}: a search for reward and one for likelihood differ by a "
            "constant, and a constant divided by lengths is none; use length_rule 'none'"
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
    """Options that do what `generate(num_beams=...)` of transformers 5 does, with its defaults."""
    return BeamOptions(
        beams,
        max_new_tokens,
        eos_ids,
        eos_rule="hf",
        length_rule="hf" if length_penalty else "none",
        length_penalty=length_penalty,
        early_stopping=early_stopping if beams > 1 else True,  # one beam is greedy decoding there: it has one end
        constraints=constraints,
    )


def t5x_compat(beams: int, max_new_tokens: int, eos_id: int, *, alpha: float = 0.6) -> BeamOptions:
    """Options that do what T5X's `beam_search` does, with its default; without its treatment of EOS in prompts."""
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
