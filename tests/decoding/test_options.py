import inspect
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import get_args

import pytest

from qstar_jax import decoding
from qstar_jax.config import DecodeOptions, Method
from qstar_jax.config.variants import declarations
from qstar_jax.decoding.constraints import Constraints
from qstar_jax.decoding.objectives import ImplicitReward, Likelihood, LogitArithmetic, RegularisedReward
from qstar_jax.decoding.options import ExactOptions, interpret
from qstar_jax.decoding.sampling import SampleOptions
from qstar_jax.decoding.search.beam_options import BeamOptions, hf_compat, t5x_compat
from qstar_jax.decoding.search.chunks import ChunkOptions
from qstar_jax.decoding.search.exact import exact_search
from qstar_jax.decoding.search.mcts_options import MctsOptions
from qstar_jax.errors import InputError

ALL = get_args(Method)
DECLARED = declarations(DecodeOptions)
READERS = dict.fromkeys(("max_new_tokens", "beta", "report_reference"), ALL)
READERS |= {name: tuple(declaration.defaults) for name, declaration in DECLARED.items() if name != "vocabulary"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"beams": 5},
            "beams 5 has no effect with method greedy; beam and chunk read it: set --decode.method beam, or leave it "
            "out",
        ),
        (
            {"method": "beam", "temperature": 1.0},
            "temperature 1.0 has no effect with method beam; sample, best_of_n and chunk read it: set --decode.method "
            "sample, or leave it out",
        ),
        (
            {"method": "beam", "top_p": 1.0},
            "top_p 1.0 has no effect with method beam; sample, best_of_n and chunk read it: set --decode.method "
            "sample, or leave it out",
        ),
        (
            {"method": "mcts", "max_expansions": 10000},
            "max_expansions 10000 has no effect with method mcts; exact reads it: set --decode.method exact, or leave "
            "it out",
        ),
        (
            {"method": "bean"},
            "method 'bean' is unknown; choose from greedy, sample, beam, best_of_n, chunk, mcts, exact",
        ),
    ],
)
def test_what_is_given_and_not_read_is_refused(options, message):
    with pytest.raises(InputError) as error:
        interpret(DecodeOptions(**options))
    assert str(error.value) == f"decode: {message}"


# A value of each option that is not its default, and what else must be set for it to have a meaning.
EXAMPLES = {
    "max_new_tokens": (5, {}),
    "min_new_tokens": (2, {}),
    "stop": (["."], {}),
    "repetition_penalty": (1.5, {}),
    "no_repeat_ngram_size": (2, {}),
    "return_sequences": (2, {}),
    "seed": (7, {"beam": {"stochastic": True}, "mcts": {"selection": "gumbel"}}),
    "temperature": (0.5, {}),
    "top_k": (5, {}),
    "top_p": (0.5, {}),
    "min_p": (0.1, {}),
    "num_samples": (3, {}),
    "rejection_interval": (2, {}),
    "rejection_keep": (0.25, {"best_of_n": {"rejection_interval": 2}}),
    "beams": (6, {}),
    "preset": ("hf", {}),
    "eos_rule": ("t5x", {}),
    "length_rule": ("gnmt", {"beam": {"length_penalty": 0.5}}),
    "length_penalty": (0.5, {"beam": {"length_rule": "hf"}}),
    "count_prompt": (True, {"beam": {"length_rule": "hf", "length_penalty": 0.5}}),
    "early_stopping": (False, {}),
    "truncated": ("drop", {}),
    "groups": (4, {"beam": {"diversity": 0.3}}),
    "diversity": (0.5, {"beam": {"groups": 2}}),
    "stochastic": (True, {}),
    "chunk_length": (3, {}),
    "samples": (3, {}),
    "delimiters": (["."], {}),
    "num_simulations": (9, {}),
    "num_actions": (3, {}),
    "selection": ("gumbel", {}),
    "max_expansions": (50, {}),
    "objective": ("regularised_reward", {}),
    "beta": (0.7, {method: {"report_reference": True} for method in ALL}),
    "report_reference": (True, {"best_of_n": {"objective": "likelihood"}}),
}
INSTEAD = {
    "groups": 2,
    "diversity": 0.3,
    "length_rule": "hf",
    "length_penalty": 0.3,
}  # these have no meaning with the other's default
LATER = {"stop", "delimiters", "seed", "beta"}  # these meet tokens, keys and models: see test_generate


def test_every_option_has_readers_and_an_example():
    names = {option.name for option in fields(DecodeOptions)}
    assert set(EXAMPLES) == set(READERS) == names - {"method", "vocabulary"}
    assert {method for readers in READERS.values() for method in readers} == set(ALL)


@pytest.mark.parametrize("name", EXAMPLES)
def test_methods_that_do_not_read_an_option_refuse_it(name):
    value, _ = EXAMPLES[name]
    others = [method for method in ALL if method not in READERS[name]]
    for method in others:
        with pytest.raises(InputError) as error:
            interpret(DecodeOptions(method=method, **{name: value}))
        message = str(error.value)
        assert message.startswith(f"decode: {name} {value!r} has no effect with method {method}; ")
        assert all(reader in message for reader in READERS[name])
        assert f"set --decode.method {READERS[name][0]}, or leave it out" in message
    assert others or name in ("max_new_tokens", "beta", "report_reference")


@pytest.mark.parametrize("name", EXAMPLES)
def test_methods_that_read_an_option_are_changed_by_it(name):
    value, companions = EXAMPLES[name]
    for method in READERS[name]:
        plain = DecodeOptions(method=method, **companions.get(method, {}))
        if name in INSTEAD:
            plain = replace(plain, **{name: INSTEAD[name]})
        changed = replace(plain, **{name: value})
        plan, before = interpret(changed), interpret(plain)
        if name in LATER or (name == "return_sequences" and method not in ("sample", "mcts", "exact")):
            continue
        made = (plan.method, plan.rejection, plan.objective(0.1), plan.needs_reference, plan.samples)
        assert made != (before.method, before.rejection, before.objective(0.1), before.needs_reference, before.samples)


@pytest.mark.parametrize(
    ("method", "own"),
    [("sample", SampleOptions), ("beam", BeamOptions), ("chunk", ChunkOptions), ("mcts", MctsOptions)],
)
def test_defaults_are_those_of_the_methods_own_options(method, own):
    defaults = {option.name: option.default for option in fields(own) if option.default is not MISSING}
    if method == "mcts":
        defaults["selection"] = defaults.pop("policy")
    shared = [name for name, declaration in DECLARED.items() if method in declaration.defaults and name in defaults]
    assert shared
    for name in shared:
        assert DECLARED[name].defaults[method] == defaults[name], name


def test_defaults_of_constraints_and_of_exact_search():
    constraints = {option.name: option.default for option in fields(Constraints)}
    assert constraints == {name: DECLARED[name].defaults["greedy"] for name in constraints}
    parameters = inspect.signature(exact_search).parameters
    assert interpret(DecodeOptions(method="exact")).method == ExactOptions(
        128, (), parameters["n_best"].default, parameters["max_expansions"].default
    )


@pytest.mark.parametrize(("preset", "made"), [("hf", hf_compat(4, 128, ())), ("t5x", t5x_compat(4, 128, 0))])
def test_the_help_names_what_presets_change(preset, made):
    plain = BeamOptions(4, 128, ())
    changed = {option.name for option in fields(made) if getattr(made, option.name) != getattr(plain, option.name)}
    for name in changed - {"eos_ids"}:
        entry = re.search(rf"\n        {name}: (.*?)(?=\n        \w+: |\Z)", DecodeOptions.__doc__, re.DOTALL).group(1)
        assert preset in entry, name
    numbers = re.search(r"length_penalty: .*?\(preset hf: (.*?), t5x: (.*?)\)", DecodeOptions.__doc__, re.DOTALL)
    assert made.length_penalty == float(numbers.group(1 + ["hf", "t5x"].index(preset)))


def test_the_readme_s_table_is_the_table():
    text = (Path(decoding.__file__).parent / "README.md").read_text(encoding="utf-8").split("| `--decode.method` |")[1]
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", text.split("\n\n")[0], re.MULTILINE))
    shared = re.search(r"All read (.*?)\. ", text, re.DOTALL).group(1)
    assert set(rows) == set(ALL)
    named = {method: set(re.findall(r"`(\w+)`", row)) for method, row in rows.items()}
    named["sample"] |= named["greedy"]  # "these"
    for method in ALL:
        for other in re.findall(r"those of `(\w+)`", rows[method]):
            named[method] = named[method] - {other} | named[other]
        read = {name for name, readers in READERS.items() if method in readers} | {"vocabulary"}
        assert named[method] | set(re.findall(r"`(\w+)`", shared)) == read, method


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"min_new_tokens": 200}, "min_new_tokens 200 is above max_new_tokens 128"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0; expected a number in \(0, inf\)"),
        ({"vocabulary": 5}, "vocabulary 5 has no effect without pairs"),
        ({"beta": 0.1}, "beta 0.1 has no effect without a reference"),
        ({"method": "sample", "return_sequences": 0}, "return_sequences is 0; expected a number in .1, inf"),
        ({"method": "sample", "temperature": -1.0}, "temperature is -1.0"),
        ({"method": "sample", "temperature": float("nan")}, "temperature is nan"),
        ({"method": "sample", "temperature": 0.0, "top_k": 5}, "temperature 0 does not sample"),
        ({"method": "sample", "temperature": 0.0, "return_sequences": 2}, "same response 2 times"),
        ({"method": "sample", "temperature": 0.0, "seed": 3}, "seed 3 has no effect"),
        ({"method": "sample", "top_p": 1.5}, r"top_p is 1.5; expected a number in \(0, 1\]"),
        ({"method": "beam", "beams": 0}, "beams is 0"),
        ({"method": "beam", "beams": 3, "return_sequences": 4}, "return_sequences 4.*beams .3"),
        ({"method": "beam", "return_sequences": 0}, "return_sequences is 0; expected a number in .1, inf"),
        ({"method": "beam", "seed": 3}, "seed 3.*stochastic true"),
        ({"method": "beam", "groups": 2}, "groups 2 with diversity 0"),
        ({"method": "beam", "length_penalty": 1.0}, "length_penalty 1.0.*length_rule none"),
        ({"method": "beam", "length_rule": "hf"}, "length_rule hf has no effect with length_penalty 0"),
        ({"method": "beam", "early_stopping": True}, "early_stopping True with eos_rule all"),
        (
            {"method": "beam", "repetition_penalty": 1.2, "objective": "implicit_reward"},
            "repetition_penalty 1.2 with ImplicitReward",
        ),
        (
            {"method": "beam", "length_rule": "hf", "length_penalty": 1.0, "objective": "implicit_reward"},
            "length_rule 'hf' with ImplicitReward",
        ),
        (
            {"method": "beam", "preset": "hf", "objective": "regularised_reward"},
            "length_rule 'hf' with Reg",
        ),
        ({"method": "beam", "stochastic": True, "objective": "implicit_reward"}, "objective is Likelihood"),
        ({"method": "best_of_n", "rejection_keep": 0.5}, "rejection_keep 0.5 has no effect without rejection_interval"),
        ({"method": "best_of_n", "rejection_interval": 0}, "rejection_interval is 0"),
        ({"method": "best_of_n", "rejection_interval": 1, "rejection_keep": 2.0}, "rejection_keep is 2.0"),
        (
            {"method": "best_of_n", "num_samples": 4, "rejection_interval": 2, "rejection_keep": 0.9},
            "rejection_interval 2 and rejection_keep 0.9 prune none of 4 samples",
        ),
        ({"method": "best_of_n", "num_samples": 3, "return_sequences": 4}, "return_sequences 4.*num_samples .3"),
        (
            {"method": "best_of_n", "num_samples": 4, "return_sequences": 2, "rejection_interval": 1},
            "return_sequences 2.*samples that rejection leaves .1",
        ),
        ({"method": "chunk", "chunk_length": 0}, "chunk_length is 0"),
        ({"method": "chunk", "beams": 2, "return_sequences": 3}, "return_sequences 3.*beams .2"),
        ({"method": "mcts", "num_simulations": 3, "return_sequences": 4}, "return_sequences 4.*num_simulations .3"),
        ({"method": "mcts", "num_actions": 0}, "num_actions is 0"),
        ({"method": "mcts", "seed": 2}, "seed 2.*selection gumbel"),
        ({"method": "exact", "max_expansions": 0}, "max_expansions is 0"),
    ],
)
def test_what_has_no_meaning_is_refused(options, named):
    with pytest.raises(InputError, match=f"^decode: .*{named}"):
        interpret(DecodeOptions(**options))


def test_presets_are_those_of_the_library():
    def made(**given):
        options = DecodeOptions(method="beam", beams=3, max_new_tokens=9, **given)
        return interpret(options).with_tokens((2, 5)).method

    assert made(preset="hf") == hf_compat(3, 9, (2, 5))
    assert made(preset="hf", length_penalty=0.0, early_stopping="never") == hf_compat(
        3, 9, (2, 5), length_penalty=0.0, early_stopping="never"
    )
    assert made(preset="hf", eos_rule="hf", min_new_tokens=2).constraints.min_new_tokens == 2
    assert made(preset="t5x") == replace(t5x_compat(3, 9, 2), eos_ids=(2, 5))
    assert made(preset="t5x", length_penalty=0.2).length_penalty == 0.2
    assert made(preset="hf") != made() and made(preset="t5x") != made() and made(preset="hf") != made(preset="t5x")


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ("hf", {"eos_rule": "all"}),
        ("hf", {"length_rule": "gnmt"}),
        ("hf", {"count_prompt": True}),
        ("hf", {"truncated": "drop"}),
        ("hf", {"groups": 2, "diversity": 0.5}),
        ("hf", {"stochastic": True}),
        ("t5x", {"early_stopping": True}),
        ("t5x", {"min_new_tokens": 2}),
        ("t5x", {"truncated": "compete"}),
    ],
)
def test_what_a_preset_contradicts_is_refused(preset, given):
    with pytest.raises(InputError, match=f"^decode: preset {preset} means "):
        interpret(DecodeOptions(method="beam", preset=preset, **given))


def test_objectives():
    best = DecodeOptions(method="best_of_n")
    beam = DecodeOptions(method="beam")
    assert interpret(best).objective(0.1) == ImplicitReward(0.1) and interpret(best).needs_reference
    assert interpret(beam).objective(0.1) == Likelihood() and not interpret(beam).needs_reference
    assert interpret(replace(best, objective="likelihood")).objective() == Likelihood()
    assert interpret(replace(beam, objective="regularised_reward")).objective(0.3) == RegularisedReward(0.3)
    guided = interpret(replace(best, vocabulary=7), pairs=2)
    assert guided.objective(None, [1.0, 0.5]) == LogitArithmetic((1.0, 0.5), 7)
    assert not guided.needs_reference


@pytest.mark.parametrize("given", [{"objective": "implicit_reward"}, {"report_reference": True}, {"vocabulary": 0}])
def test_pairs_of_models_have_no_reference(given):
    with pytest.raises(InputError, match=r"^decode: (pairs of models|vocabulary is 0; )"):
        interpret(DecodeOptions(method="beam", **given), pairs=1)
