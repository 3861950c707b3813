"""The `decode:` block: which method reads which of its options, and what the methods' own options are made of it."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, get_args

from qstar_jax.config import DecodeOptions, Method
from qstar_jax.decoding.best_of_n import Rejection
from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.objectives import ImplicitReward, Likelihood, LogitArithmetic, Objective, RegularisedReward
from qstar_jax.decoding.sampling import SampleOptions
from qstar_jax.decoding.search.beam_options import BeamOptions, hf_compat, t5x_compat
from qstar_jax.decoding.search.chunks import ChunkOptions
from qstar_jax.decoding.search.mcts import MctsOptions
from qstar_jax.errors import InputError

ALL = get_args(Method)
DRAWING = ("sample", "best_of_n", "chunk")
TOKEN_BY_TOKEN = ("greedy", "sample", "beam", "best_of_n", "chunk")

# Option -> the methods that read it, first the one to choose for its sake.
READERS: dict[str, tuple[str, ...]] = {
    "method": ALL,
    "max_new_tokens": ALL,
    "min_new_tokens": TOKEN_BY_TOKEN,
    "stop": TOKEN_BY_TOKEN,
    "repetition_penalty": TOKEN_BY_TOKEN,
    "no_repeat_ngram_size": TOKEN_BY_TOKEN,
    "return_sequences": ("sample", "beam", "best_of_n", "chunk", "mcts", "exact"),
    "seed": ("sample", "beam", "best_of_n", "chunk", "mcts"),
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p"), DRAWING),
    **dict.fromkeys(("num_samples", "rejection_interval", "rejection_keep"), ("best_of_n",)),
    "beams": ("beam", "chunk"),
    **dict.fromkeys(("preset", "eos_rule", "length_rule", "length_penalty", "count_prompt"), ("beam",)),
    **dict.fromkeys(("early_stopping", "truncated", "groups", "diversity", "stochastic"), ("beam",)),
    **dict.fromkeys(("chunk_length", "samples", "delimiters"), ("chunk",)),
    **dict.fromkeys(("num_simulations", "num_actions", "selection"), ("mcts",)),
    "max_expansions": ("exact",),
    "objective": ("beam", "best_of_n", "chunk", "mcts"),
    **dict.fromkeys(("beta", "report_reference", "vocabulary"), ALL),
}

# What options are that the user has not set; those of BeamOptions and its presets are theirs.
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "num_samples": 8,
    "rejection_keep": 0.5,
    "beams": 4,
    "chunk_length": 16,
    "samples": 4,
    "num_simulations": 64,
    "num_actions": 8,
    "selection": "puct",
    "max_expansions": 10000,
}


@dataclass(frozen=True)
class ExactOptions:
    """Arguments of `exact_search`.

    Attributes:
        max_new_tokens: Longest answer, EOS included.
        eos_ids: Tokens that end an answer.
        n_best: Answers a prompt.
        max_expansions: Prefixes that are looked at before it gives up.
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


def check_options(options: DecodeOptions, pairs: int = 0):
    """Refuses what has no meaning or would have no effect, before anything is loaded.

    Args:
        options: The block.
        pairs: How many pairs of models guide the policy.

    Raises:
        InputError: If something is wrong; it begins with "decode: ".
    """
    wrong = _not_read(options) or _without_effect(options, pairs) or _wrong_number_of_answers(options)
    if wrong:
        raise InputError(f"decode: {wrong}")
    method_options(options, ())
    make_rejection(options)
    wrong = _not_together(options, make_objective(options, 1.0, [1.0] * pairs))
    if wrong:
        raise InputError(f"decode: {wrong}")


def method_options(
    options: DecodeOptions, eos_ids: tuple[int, ...], delimiter_ids: tuple[int, ...] = ()
) -> MethodOptions:
    """Makes the options that the method's function takes.

    Args:
        options: The block.
        eos_ids: Tokens that end an answer.
        delimiter_ids: Tokens that end a chunk.

    Raises:
        InputError: If they do not go together.
    """
    try:
        return _method_options(options, (options.max_new_tokens, eos_ids), delimiter_ids)
    except ValueError as error:
        raise InputError(f"decode: {error}") from error


def make_rejection(options: DecodeOptions) -> Rejection | None:
    """Makes the rule by which best_of_n gives up samples; None where it keeps all.

    Raises:
        InputError: If its numbers are wrong.
    """
    if options.rejection_interval is None:
        return None
    try:
        return Rejection(options.rejection_interval, _value(options, "rejection_keep"))
    except ValueError as error:
        raise InputError(f"decode: rejection_interval and rejection_keep: {error}") from error


def objective_name(options: DecodeOptions, pairs: int = 0) -> str:
    """Name of the objective: the one that is set, or the method's own."""
    return options.objective or ("implicit_reward" if options.method == "best_of_n" and not pairs else "likelihood")


def needs_reference(options: DecodeOptions, pairs: int = 0) -> bool:
    """Whether the reference is run beside the policy."""
    return options.report_reference or objective_name(options, pairs) != "likelihood"


def make_objective(options: DecodeOptions, beta: float | None, weights: Sequence[float] = ()) -> Objective:
    """Makes the objective; with `weights`, that of a policy guided by so many pairs."""
    if weights:
        return LogitArithmetic(tuple(weights), options.vocabulary)
    name = objective_name(options)
    if name == "likelihood":
        return Likelihood()
    return ImplicitReward(beta) if name == "implicit_reward" else RegularisedReward(beta)


def draws(options: DecodeOptions) -> bool:
    """Whether anything is drawn, so that the seed matters."""
    if options.method in DRAWING:
        return _value(options, "temperature") != 0
    return options.stochastic or _value(options, "selection") == "gumbel"


def _value(options: DecodeOptions, name: str) -> Any:
    given = getattr(options, name)
    return DEFAULTS[name] if given is None else given


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _not_read(options: DecodeOptions) -> str | None:
    for option in fields(options):
        value, readers = getattr(options, option.name), READERS[option.name]
        if value != _default(option) and options.method not in readers:
            return (
                f"{option.name} {value!r} has no effect with method {options.method}; {' and '.join(readers)} "
                f"{'reads' if len(readers) == 1 else 'read'} it: set --decode.method {readers[0]}"
            )
    return None


def _without_effect(options: DecodeOptions, pairs: int) -> str | None:
    if pairs and (objective_name(options, pairs) != "likelihood" or options.report_reference):
        return (
            f"pairs of models make a policy of their own, which has no reference; leave out objective "
            f"{options.objective} and report_reference {options.report_reference}"
        )
    if options.vocabulary is not None and not pairs:
        return f"vocabulary {options.vocabulary} has no effect without pairs of models"
    if options.vocabulary is not None and options.vocabulary < 1:
        return f"vocabulary {options.vocabulary} is at least 1 token"
    if options.beta is not None and not needs_reference(options, pairs):
        return (
            f"beta {options.beta} has no effect without a reference; set --decode.report_reference true or an objective"
        )
    if options.rejection_keep is not None and options.rejection_interval is None:
        return f"rejection_keep {options.rejection_keep} has no effect without rejection_interval"
    if options.seed and not draws(options):
        needed = {"beam": "stochastic true", "mcts": "selection gumbel"}.get(options.method, "a temperature above 0")
        return f"seed {options.seed} has no effect, since nothing is drawn; it is read with {needed}"
    return None


def _wrong_number_of_answers(options: DecodeOptions) -> str | None:
    wanted, found, what = options.return_sequences, 0, ""
    if wanted < 1:
        return f"return_sequences {wanted}: expected at least 1"
    if options.method in ("beam", "chunk"):
        found, what = _value(options, "beams"), "beams"
    elif options.method == "best_of_n":
        rejection = make_rejection(options)
        found, what = _value(options, "num_samples"), "num_samples"
        if rejection:
            stages = rejection.stages(found, options.max_new_tokens)
            if len(stages) == 1:
                return (
                    f"rejection_interval {rejection.interval} and rejection_keep {rejection.keep} drop none of {found} "
                    f"samples within {options.max_new_tokens} tokens"
                )
            found, what = stages[-1][0], "samples that rejection leaves"
    elif options.method == "mcts":
        found, what = _value(options, "num_simulations"), "num_simulations"
    if 1 <= found < wanted:
        return f"return_sequences {wanted} asks for more answers than there are {what} ({found})"
    return None


def _not_together(options: DecodeOptions, objective: Objective) -> str | None:
    """What methods say themselves, but only when models are loaded and compiled."""
    if options.method != "beam":
        return None
    made, name = method_options(options, ()), type(objective).__name__
    if made.length_rule != "none" and not objective.comparable_across_lengths:
        return (
            f"length_rule {made.length_rule} with objective {options.objective}: a search for reward and one for "
            "likelihood differ by a constant, and a constant divided by lengths is none; set length_rule none"
        )
    if options.repetition_penalty != 1 and not objective.comparable_across_lengths:
        return (
            f"repetition_penalty {options.repetition_penalty} with objective {options.objective}: it scales "
            "log-probabilities, and a reward near 0 would be no worse for it; use no_repeat_ngram_size"
        )
    if made.stochastic and not isinstance(objective, Likelihood):
        return f"stochastic beams are drawn from one policy, so their objective is Likelihood, not {name}"
    return None


def _method_options(options: DecodeOptions, common: tuple, delimiter_ids: tuple[int, ...]) -> MethodOptions:
    constraints = Constraints(options.min_new_tokens, options.repetition_penalty, options.no_repeat_ngram_size)
    drawing = {name: getattr(options, name) for name in ("top_k", "top_p", "min_p")}
    drawing |= {"temperature": _value(options, "temperature"), "constraints": constraints}
    match options.method:
        case "greedy":
            return SampleOptions(*common, temperature=0.0, constraints=constraints)
        case "sample":
            return SampleOptions(*common, options.return_sequences, **drawing)
        case "best_of_n":
            return SampleOptions(*common, _value(options, "num_samples"), **drawing)
        case "chunk":
            sizes = [_value(options, name) for name in ("beams", "samples", "chunk_length")]
            return ChunkOptions(*common, *sizes, delimiter_ids, **drawing)
        case "mcts":
            sizes = [_value(options, name) for name in ("num_simulations", "num_actions", "selection")]
            return MctsOptions(*common, *sizes, options.return_sequences)
        case "exact":
            return ExactOptions(*common, options.return_sequences, _value(options, "max_expansions"))
    return _beam_options(options, common, constraints)


def _beam_options(options: DecodeOptions, common: tuple, constraints: Constraints) -> BeamOptions:
    names = ("eos_rule", "length_rule", "length_penalty", "count_prompt", "early_stopping", "truncated")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given |= {name: getattr(options, name) for name in ("groups", "diversity", "stochastic")}
    beams = _value(options, "beams")
    if options.preset == "none":
        return BeamOptions(beams, *common, constraints=constraints, **given)
    if options.preset == "hf":
        free = {name: given[name] for name in ("length_penalty", "early_stopping") if name in given}
        made = hf_compat(beams, *common, constraints=constraints, **free)
    else:
        free = {"alpha": given["length_penalty"]} if "length_penalty" in given else {}
        made = replace(t5x_compat(beams, common[0], 0, **free), eos_ids=common[1])
    given["constraints"] = constraints
    for name, value in given.items():
        own = getattr(made, name)
        if own != value:
            raise ValueError(f"preset {options.preset} means {name} {own}, not {value}; leave one of the two out")
    return made
