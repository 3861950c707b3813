import math
import re
from dataclasses import replace
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses
from qstar_jax.config import LossOptions
from qstar_jax.config.variants import declarations
from qstar_jax.errors import InputError
from qstar_jax.losses import make_loss, reference_free, segments
from qstar_jax.losses.registry import DECLARED, defaults
from qstar_jax.mdp import TokenScores

READS = {
    "sigmoid sigmoid_norm robust hinge ipo ipo_sum exo_pair discopop dpop dpo_shift": "log_ratios",
    "nca_pair bco_pair sppo_hard apo_zero apo_down aot_unpaired plackett_luce": "log_ratios",
    "kto": "log_ratios labels baseline",
    "implicit_prm": "log_ratios labels",
    "a_star qrpo": "log_ratios rewards reference_rewards",
    "aot": "logp ref_logp",
    "sft simpo cpo orpo cpl": "logp",
    "tdpo1 tdpo2": "log_ratios kl",
    "tgdpo": "log_ratios guide_rewards",
    "weighted_sigmoid": "log_ratios weights",
    "dmpo": "log_ratios turns",
}
ARRAYS = {name: {"mask", *arrays.split()} for names, arrays in READS.items() for name in names.split()}
REFERENCE_FREE = {"sft", "simpo", "cpo", "orpo", "cpl"}

KEYS = jax.random.split(jax.random.key(0), 9)
SHAPE = (4, 2, 4)
LOGP, REF, LOG_SUM_SQ, KL = (-jax.random.exponential(key, SHAPE) for key in KEYS[:4])
EVERYTHING = {
    "logp": LOGP,
    "ref_logp": REF,
    "log_ratios": LOGP - REF,
    "log_sum_sq": LOG_SUM_SQ,
    "kl": -KL,
    "guide_rewards": jax.random.normal(KEYS[4], SHAPE),
    "weights": jnp.abs(KL) + 0.5,
    "turns": jnp.broadcast_to(jnp.array([0, 1, 1, 2]), SHAPE),
    "mask": jax.random.bernoulli(KEYS[5], 0.6, SHAPE).at[..., 0].set(True),
    "labels": jax.random.bernoulli(KEYS[6], 0.5, SHAPE[:2]).at[0].set(jnp.array([True, False])),
    "baseline": jnp.float32(0.3),
    "rewards": jax.random.normal(KEYS[7], SHAPE[:2]),
    "reference_rewards": jax.random.normal(KEYS[8], (*SHAPE[:2], 3)).at[0, 0, 2].set(jnp.nan),
}
MASK = EVERYTHING["mask"]
SCORES = TokenScores(LOGP, REF, None, MASK)


def extras(loss):
    return {name: EVERYTHING[name] for name in loss.extra_arrays}


def call(loss, **changed):
    scores = replace(SCORES, **{name: changed.pop(name) for name in ("logp", "ref_logp") if name in changed})
    return loss(scores, **{"labels": EVERYTHING["labels"]} | extras(loss) | changed)


def direct(name, **options):
    return losses.LOSSES[name](**{array: EVERYTHING[array] for array in ARRAYS[name]}, **options)


def test_a_loss_reads_scores_by_hand():
    # Rewards 0.5 * (-1 + 3) = 1 and 0.5 * (-2 + 1.5) = -0.25; the second token of the rejected response is padding.
    scores = TokenScores(
        logp=jnp.array([[[-0.5, -0.5], [-2.0, 9.0]]]),
        ref_logp=jnp.array([[[-1.0, -2.0], [-1.5, 9.0]]]),
        logz=None,
        mask=jnp.array([[[True, True], [True, False]]]),
    )
    loss, metrics = make_loss("sigmoid", beta=0.5)(scores)
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-1.25))], rtol=1e-6)
    np.testing.assert_allclose(metrics.rewards, [[1.0, -0.25]])


def test_arrays_of_every_loss():
    assert set(losses.LOSSES) == set(ARRAYS)
    for name, arrays in ARRAYS.items():
        loss = make_loss(name)
        assert loss.arrays == arrays
        assert loss.uses_reference == (name not in REFERENCE_FREE)
        assert all(function.__name__ == name for function in [losses.LOSSES[name], getattr(losses, name)])


def test_arrays_of_mixtures_and_weighted_pairs():
    mixture = make_loss(["sft", "sigmoid"])
    assert mixture.arrays == {"logp", "log_ratios", "mask"} and mixture.uses_reference
    assert not make_loss(["sft", "simpo"]).uses_reference
    assert make_loss("sigmoid", wpo=True).arrays == {"logp", "log_sum_sq", "log_ratios", "mask"}
    weighted = make_loss("simpo", wpo=True)
    assert weighted.arrays == {"logp", "log_sum_sq", "mask"} and not weighted.uses_reference


@pytest.mark.parametrize("name", ARRAYS)
def test_a_loss_by_name_is_the_function(name):
    found, metrics = call(make_loss(name))
    expected, expected_metrics = direct(name)
    if losses.reads_single(name):
        assert expected.shape == (4, 2)
        expected = (expected[:, 0] + expected[:, 1]) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(metrics.rewards, expected_metrics.rewards)
    assert found.shape == metrics.margins.shape == (4,)


def test_missing_and_extra_arrays():
    loss = make_loss("tdpo1")
    with pytest.raises(TypeError, match=r"tdpo1 takes \['kl'\] beside the scores; got \[\]"):
        loss(SCORES)
    with pytest.raises(TypeError, match=r"got \['baseline', 'kl'\]"):
        loss(SCORES, kl=-KL, baseline=jnp.float32(0.3))
    with pytest.raises(TypeError, match=r"sigmoid takes no arrays beside the scores; got \['kl'\]"):
        make_loss("sigmoid")(SCORES, kl=-KL)


@pytest.mark.parametrize("name", ["sigmoid", "aot", ["sft", "kto"]])
def test_scores_without_a_reference_are_refused(name):
    loss = make_loss(name)
    with pytest.raises(ValueError, match="no ref_logp; score with a reference model"):
        loss(replace(SCORES, ref_logp=None), **extras(loss))


def test_the_first_response_is_the_desirable_one_unless_labels_say_otherwise():
    chosen_first = jnp.broadcast_to(jnp.array([True, False]), SHAPE[:2])
    for name in ("kto", "implicit_prm"):
        loss = make_loss(name)
        np.testing.assert_array_equal(loss(SCORES, **extras(loss))[0], call(loss, labels=chosen_first)[0])
        assert np.abs(call(loss, labels=~chosen_first)[0] - call(loss, labels=chosen_first)[0]).max() > 1e-3


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    found, metrics = call(make_loss(names, weights=weights, beta=0.3, label_smoothing=0.1))
    first, first_metrics = direct("sigmoid", beta=0.3, label_smoothing=0.1)
    expected = 0.8 * first + 0.2 * direct("bco_pair", beta=0.3)[0] + direct("sft")[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(metrics.rewards, first_metrics.rewards)
    plain = call(make_loss(names))[0]
    np.testing.assert_allclose(plain, sum(direct(name)[0] for name in names), rtol=1e-6)
    # A term without a reference does not speak for the mixture, wherever it stands.
    np.testing.assert_array_equal(call(make_loss(names[::-1]))[1].rewards, direct("bco_pair")[1].rewards)
    np.testing.assert_array_equal(call(make_loss(["sft", "simpo"]))[1].rewards, direct("sft")[1].rewards)


def test_places_of_a_ranking_may_be_empty():
    present = jnp.ones(SHAPE[:2], bool).at[0, 1].set(False)
    loss, metrics = make_loss("plackett_luce")(SCORES, present=present)
    np.testing.assert_array_equal(loss, losses.plackett_luce(EVERYTHING["log_ratios"], MASK, present)[0])
    assert loss[0] == 0 and metrics.rewards[0, 1] == 0


def test_losses_of_single_responses_in_a_mixture():
    found = call(make_loss(["sigmoid", "kto"], weights=[1.0, 2.0]))[0]
    np.testing.assert_allclose(found, direct("sigmoid")[0] + 2 * direct("kto")[0].mean(-1), rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "bco_pair", "aot", "aot_unpaired", "tdpo1", "dpop"])
def test_ld_alpha_weighs_tokens_of_policy_and_reference(name):
    weights = np.ones(SHAPE)
    for row in range(4):
        shared = min(MASK[row].sum(-1))
        for response in range(2):
            weights[row, response, np.cumsum(MASK[row, response]) > shared] = 0.4
    weighed = {array: EVERYTHING[array] * weights for array in ("logp", "ref_logp")}
    found = call(make_loss(name, ld_alpha=0.4))[0]
    np.testing.assert_allclose(found, call(make_loss(name), **weighed)[0], rtol=1e-5)
    assert np.abs(found - call(make_loss(name))[0]).max() > 1e-3
    np.testing.assert_allclose(call(make_loss(name, ld_alpha=1.0))[0], call(make_loss(name))[0], rtol=1e-6)


def test_ld_alpha_leaves_terms_without_a_reference_alone():
    found = call(make_loss(["sigmoid", "sft"], ld_alpha=0.4))[0]
    np.testing.assert_allclose(found, call(make_loss("sigmoid", ld_alpha=0.4))[0] + direct("sft")[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "kto", ["sigmoid", "sft"]])
def test_wpo_multiplies_the_loss(name):
    found, metrics = call(make_loss(name, wpo=True))
    aligned = np.where(MASK, LOGP - LOG_SUM_SQ, 0).sum(-1) / np.asarray(MASK).sum(-1)
    plain, plain_metrics = call(make_loss(name))
    np.testing.assert_allclose(found, plain * np.exp(aligned.sum(-1)), rtol=1e-5)
    np.testing.assert_array_equal(metrics.rewards, plain_metrics.rewards)


def test_no_gradient_flows_through_the_weights_of_wpo():
    def loss(shift):  # of both models, which moves the weights and no log-ratio
        return call(make_loss("sigmoid", wpo=True), logp=LOGP + shift, ref_logp=REF + shift)[0].sum()

    grad = jax.grad(loss)(jnp.zeros(SHAPE))
    np.testing.assert_array_equal(grad, 0)


def test_divergences_by_name():
    for name in ("sigmoid", "ipo"):
        for divergence, function in losses.DIVERGENCES.items():
            found = call(make_loss(name, divergence=divergence))[0]
            np.testing.assert_allclose(found, direct(name, divergence=function)[0], rtol=1e-6)
        found = call(make_loss(name, divergence="alpha_divergence", divergence_alpha=0.2))[0]
        expected = direct(name, divergence=partial(losses.alpha_divergence, alpha=0.2))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_none_is_the_default():
    nothing = dict.fromkeys(DECLARED)
    for name in losses.LOSSES:
        assert make_loss(name, **nothing) == make_loss(name)
    loss = make_loss("cpl", **(nothing | {"bias": 0.9}))
    assert loss.options[0]["bias"] == 0.9 and loss.options[0]["beta"] == 0.1


def test_beta_is_that_of_the_first_loss_with_a_reference():
    assert make_loss().beta == make_loss("sigmoid").beta == 0.1
    assert make_loss(["simpo", "sigmoid"]).beta == 0.1
    assert make_loss(["simpo", "sigmoid"], beta=0.7).beta == 0.7
    assert make_loss("orpo").beta is None and make_loss("simpo").beta is None


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_that_look_at_their_batch_say_so(name):
    assert make_loss(name).couples_rows == (name in ("aot", "aot_unpaired", "sft", "cpo", "orpo"))
    if "normalize" in make_loss(name).options[0]:
        assert not make_loss(name, normalize="none").couples_rows


def test_under_jit_grad_and_vmap():
    loss = make_loss(["sigmoid", "sft"], weights=[1.0, 0.5], normalize="answer_tokens", wpo=True, ld_alpha=0.3)
    expected = loss(SCORES, **extras(loss))[0]
    np.testing.assert_allclose(jax.jit(lambda x, y: loss(x, **y)[0])(SCORES, extras(loss)), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x, y: loss(x, **y)[0])(SCORES, extras(loss)), expected, rtol=1e-5)
    grad = jax.grad(lambda ref: loss(replace(SCORES, ref_logp=ref), **extras(loss))[0].sum())(REF)
    assert np.abs(grad).max() > 1e-3


def test_loss_at_reference():
    known = {"sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0, "kto": 0.5, "aot": math.log(2), "sppo_hard": 50.0}
    for name, value in known.items():
        assert make_loss(name).loss_at_reference == pytest.approx(value, rel=1e-6)
    assert make_loss(["sigmoid", "hinge"], weights=[2.0, 3.0]).loss_at_reference == pytest.approx(2 * math.log(2) + 3)
    assert make_loss("ipo", beta=0.5).loss_at_reference == pytest.approx(1.0)
    unknown = [make_loss("simpo"), make_loss(["sigmoid", "sft"]), make_loss("sigmoid", wpo=True), make_loss("a_star")]
    for loss in (*unknown, make_loss("qrpo"), make_loss("kto", desirable_weight=2.0)):
        assert loss.loss_at_reference is None


@pytest.mark.parametrize("name", [name for name in ARRAYS if name not in REFERENCE_FREE | {"a_star", "qrpo"}])
def test_loss_at_reference_is_what_the_loss_says_there(name):
    at_reference = {"ref_logp": LOGP, "labels": jnp.broadcast_to(jnp.array([True, False]), SHAPE[:2])}
    zeros = {"kl": KL * 0, "baseline": jnp.float32(0.0)}
    loss = make_loss(name)
    found = call(loss, **at_reference, **{array: zeros[array] for array in loss.extra_arrays & zeros.keys()})[0]
    np.testing.assert_allclose(found, make_loss(name).loss_at_reference, rtol=1e-6)


def test_says_how_it_would_be_called():
    assert str(make_loss("dpop", penalty=5.0)) == "dpop(beta=0.3, penalty=5.0)"
    mixture = str(make_loss(["sft", "bco_pair"], weights=[1.0, 0.2], ld_alpha=0.5, wpo=True))
    assert mixture == "1 sft(normalize=batch_tokens) + 0.2 bco_pair(beta=0.1), ld_alpha=0.5, wpo"


REFUSED = [
    (("sigmoyd", {}), r"loss 'sigmoyd' is unknown, did you mean sigmoid\?; known are " + ", ".join(losses.LOSSES)),
    ((["sigmoid", "zzz"], {}), r"loss 'zzz' is unknown; known are"),
    (([], {}), r"no loss is named; choose from sigmoid, "),
    ((["sft", "sigmoid", "sft"], {}), r"named twice in sft, sigmoid, sft; give it once"),
    ((["sft", "sigmoid"], {"weights": [1.0]}), r"1 weights are given for 2 losses \(sft, sigmoid\)"),
    (("sigmoid", {"weights": [1.0, 1.0]}), r"2 weights are given for 1 losses"),
    (("sigmoid", {"weights": []}), r"0 weights are given"),
    (
        ("sigmoid", {"tau": 0.1}),
        r"tau 0.1 has no effect with name sigmoid; discopop reads it: set --loss.name disc",
    ),
    (("sigmoid", {"gamma": 0.1}), r"; simpo reads it: set --loss.name simpo, or leave"),
    (
        ("sft", {"beta": 0.1}),
        r"beta 0.1 has no effect with name sft; sigmoid, .* and plackett_luce read it: set",
    ),
    (("kto", {"label_smoothing": 0.1}), r"; sigmoid, robust, exo_pair, aot, aot_unpaired, simpo and cpo read it"),
    ((["sft", "sigmoid"], {"penalty": 1.0}), r"penalty 1.0 has no effect with name sft \+ sigmoid; dpop reads it"),
    (
        ("sigmoid", {"label_smoothin": 0.1}),
        r"'label_smoothin' is unknown, did you mean label_smoothing\?; sigmoid reads",
    ),
    (("sigmoid", {"zzz": 0.1}), r"'zzz' is unknown; sigmoid reads beta"),
    (("exo_pair", {"label_smoothing": 0.0}), r"exo_pair: label_smoothing is 0, .* infinite; 1e-3 is usual"),
    ((["sigmoid", "exo_pair"], {"label_smoothing": 0}), r"exo_pair: label_smoothing is 0"),
    (("sigmoid", {"divergence": "kl"}), r"divergence 'kl' is unknown; choose from reverse_kl, forward_kl, js_div"),
    (("sigmoid", {"divergence_alpha": 0.3}), r"is the order of alpha_divergence; the divergence is reverse_kl"),
    (("sigmoid", {"divergence": "js_divergence", "divergence_alpha": 0.3}), r"the divergence is js_divergence"),
    (("dpop", {"divergence": "js_divergence"}), r"divergence 'js_divergence' has no effect with name dpop; sigmoid, "),
    (("simpo", {"ld_alpha": 0.5}), r"ld_alpha weighs log-ratios to a reference, and simpo has no reference"),
    ((["sft", "cpl"], {"ld_alpha": 0.5}), r"sft \+ cpl has no reference"),
    (("kto", {"ld_alpha": 0.5}), r"compares the lengths of two responses, and kto does not read pairs"),
    (("plackett_luce", {"ld_alpha": 0.5}), r"plackett_luce does not read pairs"),
    ((["sigmoid", "implicit_prm"], {"ld_alpha": 0.5}), r"does not read pairs"),
    (("aot", {"wpo": True}), r"wpo weighs pairs, and aot sorts margins"),
    ((["sigmoid", "aot_unpaired"], {"wpo": True}), r"wpo weighs pairs"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refuses(arguments, message):
    name, options = arguments
    with pytest.raises(InputError, match=message):
        make_loss(name, **options)


BAD_VALUES = {
    "beta": ("sigmoid", "(0, inf)", [0, 0.0, -1.0]),
    "label_smoothing": ("sigmoid", "[0, 0.5)", [0.5, -0.1, 1]),
    "tau": ("discopop", "(0, inf)", [0.0]),
    "penalty": ("dpop", "[0, inf)", [-1.0]),
    "shift": ("dpo_shift", "(0, 1]", [0.0, 1.01]),
    "desirable_weight": ("kto", "[0, inf)", [-1.0]),
    "undesirable_weight": ("kto", "[0, inf)", [-1.0]),
    "value_beta": ("a_star", "(0, inf)", [0.0]),
    "nll_weight": ("cpo", "[0, inf)", [-1.0]),
    "odds_weight": ("orpo", "[0, inf)", [-1.0]),
    "bias": ("cpl", "(0, 1]", [0.0, 1.5]),
    "discount": ("cpl", "(0, 1]", [0.0, 1.5]),
    "bc_weight": ("cpl", "[0, inf)", [-1.0]),
}


@pytest.mark.parametrize("option", BAD_VALUES)
def test_numbers_out_of_range(option):
    name, interval, values = BAD_VALUES[option]
    for value in [*values, math.nan, math.inf, "0.1", True, [0.1]]:
        expected = re.escape(f"loss: {option} is {value!r}; expected a number in {interval}")
        with pytest.raises(InputError, match=expected):
            make_loss(name, **{option: value})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpop", {"beta": 0.3, "penalty": 50.0}),
        ("sft", {"normalize": "batch_tokens"}),
        ("ipo", {"beta": 0.1, "divergence": "reverse_kl", "divergence_alpha": None}),
        ("kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    ],
)
def test_defaults_are_those_of_the_signature(name, expected):
    assert defaults(name) == expected
    assert {option: d.defaults[name] for option, d in DECLARED.items() if name in d.defaults} == expected


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_option_that_a_loss_does_not_read_is_refused(name):
    unread = [option for option, declaration in DECLARED.items() if name not in declaration.defaults]
    assert unread
    for option in unread:
        with pytest.raises(InputError, match=f"loss: {option} 0.25 has no effect with name {name};"):
            make_loss(name, **{option: 0.25})


def test_the_command_line_knows_every_option_and_limit_of_losses_that_it_can_train():
    assert DECLARED.keys() == declarations(LossOptions).keys() - {"ld_alpha"}
    numbers = DECLARED.keys() - {"divergence", "normalize", "bc_data"}
    assert numbers == {option for option, declaration in DECLARED.items() if declaration.bounds}
    assert DECLARED["normalize"].choices == get_args(reference_free.Normalization)
    assert DECLARED["bc_data"].choices == get_args(segments.Cloned)
    assert DECLARED["divergence"].choices == tuple(losses.DIVERGENCES)


def test_ld_alpha_out_of_range():
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"loss: ld_alpha is .*; expected a number in \[0, 1\]"):
            make_loss("sigmoid", ld_alpha=value)


def test_ends_of_ranges_are_allowed():
    for name, options in (
        ("sigmoid", {"label_smoothing": 0, "ld_alpha": 0.0}),
        ("sigmoid", {"beta": 1, "ld_alpha": 1.0}),
        ("dpo_shift", {"shift": 1}),
        ("cpl", {"bias": 1, "discount": 1.0, "bc_weight": 0}),
        ("dpop", {"penalty": 0.0}),
    ):
        make_loss(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", {"divergence": "alpha_divergence", "divergence_alpha": math.nan}),
        ("sigmoid", {"divergence": "alpha_divergence", "divergence_alpha": "0.5"}),
        ("sigmoid", {"divergence": ["js_divergence"]}),
        ("tdpo2", {"alpha": math.nan}),
        ("tgdpo", {"alpha": "0.5"}),
        ("simpo", {"gamma": math.nan}),
        ("sft", {"normalize": "tokens"}),
        ("cpl", {"bc_data": "both"}),
        ("sigmoid", {"weights": [math.nan]}),
        ("plackett_luce", {"wpo": True}),
    ],
)
def test_refuses_what_cannot_be_computed(name, options):
    with pytest.raises(InputError):
        make_loss(name, **options)


def test_can_be_compiled_as_it_is():
    loss = make_loss("sigmoid")
    np.testing.assert_allclose(jax.jit(loss)(SCORES)[0], loss(SCORES)[0], rtol=1e-6)
