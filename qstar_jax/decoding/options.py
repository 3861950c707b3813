"""The `decode:` block, interpreted: which method runs with which options, under which objective."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qstar_jax.config import DecodeOptions
from qstar_jax.config.variants import check_variant, fill_in
from qstar_jax.decoding.best_of_n import Rejection
from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.objectives import ImplicitReward, Likelihood, LogitArithmetic, Objective, RegularisedReward
from qstar_jax.decoding.sampling import SampleOptions
from qstar_jax.decoding.search.beam_options import BeamOptions, check_objective, hf_compat, t5x_compat
from qstar_jax.decoding.search.chunks import ChunkOptions
from qstar_jax.decoding.search.mcts_options import MctsOptions
from qstar_jax.errors import InputError


@dataclass(frozen=True)
class ExactOptions:
    """Arguments of `exact_search`.

    Attributes:
        max_new_tokens: Longest response, EOS included.
        eos_ids: Tokens that end a response.
        n_best: Responses per prompt.
        max_expansions: Prefixes to expand before the search ends without proof.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    n_best: int
    max_expansions: int

    def __post_init__(self):
        """Checks the numbers."""
        if self.max_new_tokens < 1 or self.n_best < 1 or self.max_expansions < 1:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens}, return_sequences {self.n_best} and max_expansions "
                f"{self.max_expansions} are at least 1"
            )


MethodOptions = SampleOptions | BeamOptions | ChunkOptions | MctsOptions | ExactOptions


@dataclass(frozen=True)
class DecodePlan:
    """A `decode:` block, interpreted. `interpret` makes it.

    Attributes:
        block: The block, with the defaults of its method and the name of its objective filled in.
        method: The method's own options; they know no tokens before `with_tokens`.
        rejection: The rule by which best_of_n prunes samples; None: never.
        pairs: How many pairs of models guide the policy.
    """

    block: DecodeOptions
    method: MethodOptions
    rejection: Rejection | None
    pairs: int

    @property
    def samples(self) -> bool:
        """Whether anything is sampled, so that the seed matters."""
        if isinstance(self.method, MctsOptions):
            return self.method.policy == "gumbel"
        if isinstance(self.method, BeamOptions):
            return self.method.stochastic
        return isinstance(self.method, SampleOptions | ChunkOptions) and self.method.temperature != 0

    @property
    def batched(self) -> bool:
        """Whether a batch of prompts is decoded at once: not by methods with one key per batch, nor by exact search."""
        has_one_key = self.block.method in ("beam", "mcts") and self.samples
        return not has_one_key and self.block.method != "exact"

    @property
    def needs_reference(self) -> bool:
        """Whether the reference runs beside the policy."""
        return self.block.report_reference or self.block.objective != "likelihood"

    def objective(self, beta: float | None = None, weights: Sequence[float] = ()) -> Objective:
        """Makes the objective.

        Args:
            beta: Temperature of the rewards: reward per nat; None without a reference.
            weights: Weight of each pair of models.
        """
        if self.pairs:
            return LogitArithmetic(tuple(weights), self.block.vocabulary)
        if self.block.objective == "likelihood":
            return Likelihood()
        return ImplicitReward(beta) if self.block.objective == "implicit_reward" else RegularisedReward(beta)

    def with_tokens(self, eos_ids: tuple[int, ...], delimiter_ids: tuple[int, ...] = ()) -> "DecodePlan":
        """Adds what depends on a model: the tokens that end a response, and those that end a chunk."""
        tokens = {"eos_ids": eos_ids} | ({"delimiter_ids": delimiter_ids} if delimiter_ids else {})
        return replace(self, method=replace(self.method, **tokens))


def interpret(options: DecodeOptions, pairs: int = 0) -> DecodePlan:
    """Interprets a block, and refuses what has no meaning or would have no effect, before anything is loaded.

    Raises:
        InputError: If an option is refused; the message begins with "decode: ".
    """
    # What was given must be read; then defaults stand for what was not.
    check_variant(options, "decode")
    block = fill_in(options)
    if block.objective is None or (pairs and options.objective is None):
        block = replace(block, objective="likelihood")
    # The method's own options check themselves; what follows are checks between options.
    try:
        rejection = None
        if block.rejection_interval is not None:
            rejection = Rejection(block.rejection_interval, block.rejection_keep)
        _check_count(block, rejection)
        plan = DecodePlan(block, _method_options(block, options), rejection, pairs)
        _check_effects(plan, options)
        if isinstance(plan.method, BeamOptions):
            check_objective(plan.method, plan.objective(1.0, [1.0] * pairs))
    except ValueError as error:
        raise InputError(f"decode: {error}") from error
    return plan


def _method_options(block: DecodeOptions, given: DecodeOptions) -> MethodOptions:
    common: dict[str, Any] = {"max_new_tokens": block.max_new_tokens, "eos_ids": ()}
    if block.method == "mcts":
        sizes = {"num_simulations": block.num_simulations, "num_actions": block.num_actions}
        return MctsOptions(**common, **sizes, policy=block.selection, n_best=block.return_sequences)
    if block.method == "exact":
        return ExactOptions(**common, n_best=block.return_sequences, max_expansions=block.max_expansions)
    common["constraints"] = Constraints(block.min_new_tokens, block.repetition_penalty, block.no_repeat_ngram_size)
    if block.method == "beam":
        return _beam_options(block, given, common)
    if block.method == "greedy":
        return SampleOptions(**common, temperature=0.0)
    common |= {name: getattr(block, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    if block.method == "chunk":
        return ChunkOptions(**common, beams=block.beams, samples=block.samples, chunk_length=block.chunk_length)
    count = block.num_samples if block.method == "best_of_n" else block.return_sequences
    return SampleOptions(**common, num_samples=count)


def _beam_options(block: DecodeOptions, given: DecodeOptions, common: dict[str, Any]) -> BeamOptions:
    """A preset is not overridden: of its six options only those that it leaves open may be given beside it."""
    names = ("eos_rule", "length_rule", "length_penalty", "count_prompt", "early_stopping", "truncated")
    rules = {name: getattr(given, name) for name in (*names, "groups", "diversity", "stochastic")}
    rules = {name: value for name, value in rules.items() if value is not None}
    if block.preset == "none":
        return BeamOptions(block.beams, **common, **rules)
    if block.preset == "hf":
        free = {name: rules[name] for name in ("length_penalty", "early_stopping") if name in rules}
        made = hf_compat(block.beams, **common, **free)
    else:
        free = {"alpha": rules["length_penalty"]} if "length_penalty" in rules else {}
        made = replace(t5x_compat(block.beams, block.max_new_tokens, 0, **free), eos_ids=())
    for name, value in (rules | {"constraints": common["constraints"]}).items():
        if getattr(made, name) != value:
            raise ValueError(
                f"preset {block.preset} means {name} {getattr(made, name)}, not {value}; leave one of the two out"
            )
    return made


def _check_count(block: DecodeOptions, rejection: Rejection | None):
    """Refuses to return more responses than a method finds."""
    name = {"beam": "beams", "chunk": "beams", "best_of_n": "num_samples", "mcts": "num_simulations"}.get(block.method)
    if name is None:
        return
    count = getattr(block, name)
    if rejection:
        stages = rejection.stages(count, block.max_new_tokens)
        if len(stages) == 1:
            raise ValueError(
                f"rejection_interval {rejection.interval} and rejection_keep {rejection.keep} prune none of {count} "
                f"samples within {block.max_new_tokens} tokens"
            )
        count, name = stages[-1][0], "samples that rejection leaves"
    if 1 <= count < block.return_sequences:
        raise ValueError(
            f"return_sequences {block.return_sequences} asks for more responses than there are {name} ({count})"
        )


def _check_effects(plan: DecodePlan, given: DecodeOptions):
    """Refuses options that their method reads, but not together with the others."""
    block = plan.block
    if plan.pairs and plan.needs_reference:
        raise ValueError(
            f"pairs of models make a policy of their own, which has no reference; leave out objective "
            f"{given.objective} and report_reference {block.report_reference}"
        )
    if block.vocabulary is not None and not plan.pairs:
        raise ValueError(f"vocabulary {block.vocabulary} has no effect without pairs of models")
    if block.beta is not None and not plan.needs_reference:
        raise ValueError(
            f"beta {block.beta} has no effect without a reference; set --decode.report_reference true or an objective"
        )
    if given.rejection_keep is not None and plan.rejection is None:
        raise ValueError(f"rejection_keep {given.rejection_keep} has no effect without rejection_interval")
    if block.seed and not plan.samples:
        needed = {"beam": "stochastic true", "mcts": "selection gumbel"}.get(block.method, "a temperature above 0")
        raise ValueError(f"seed {block.seed} has no effect, since nothing is sampled; it is read with {needed}")
