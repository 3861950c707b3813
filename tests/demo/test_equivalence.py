"""Search for reward is search for likelihood: on random MDPs, and on a transformer that DPO has trained."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qstar_jax import losses
from qstar_jax.decoding.objectives import ImplicitReward, Likelihood, RegularisedReward
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.demo import equivalence
from qstar_jax.demo.equivalence import TOLERANCE, Comparison
from qstar_jax.models import CausalLM

COUNT = 200


@pytest.fixture(scope="module")
def problems():
    with jax.enable_x64(True):
        return jax.device_get(equivalence.random_problems(COUNT))


def by_objective(rows):
    """What is predicted to agree, and the others; everything as predicted."""
    assert all(row.passed and row.total == COUNT for row in rows)
    equal, unequal = ({row.objective: row for row in rows if row.equal is value} for value in (True, False))
    assert all(row.agree == COUNT and row.error <= TOLERANCE for row in equal.values())
    return equal, unequal


def test_problems_are_solved(problems):
    """Eq. 13 itself, by plain sums along every path: its two sides differ by V*(s_0)."""
    paths = problems.tree.paths
    for row in range(0, COUNT, 20):
        bonus = np.asarray(problems.rewards)[row] + problems.beta * np.asarray(problems.ref_logp)[row]
        sums = [
            np.where(paths.mask, np.asarray(x)[paths.states, paths.tokens], 0).sum(-1)
            for x in (bonus, problems.log_policy[row])
        ]
        np.testing.assert_allclose(
            sums[0] - problems.beta * sums[1], np.asarray(problems.values)[row, 0], rtol=0, atol=TOLERANCE
        )
        assert np.ptp(sums[0]) > 0.1
    sizes = np.asarray(problems.rewards).std((1, 2))
    assert sizes.min() < 0.4 and sizes.max() > 2  # mild and strong preferences


@pytest.mark.thin("4-0.75")
@pytest.mark.parametrize(("beams", "at_most"), [(1, 0.9), (2, 0.75), (4, 0.75), (8, 0.85)])
def test_beams(problems, beams, at_most):
    with jax.enable_x64(True):
        equal, unequal = by_objective(equivalence.compare_beams(problems, beams))
    assert list(equal) == ["r + beta log pi_ref, V*"]
    found = {name: row.agree for name, row in unequal.items()}
    assert len(found) == 4 and max(found.values()) < at_most * COUNT
    assert found["beta log(pi/pi_ref)"] == found["r, V*"]  # their sums differ by V*(s_0) too
    assert found["r, V*"] < 0.1 * COUNT or beams < 4


@pytest.mark.slow
@pytest.mark.thin("gumbel")
@pytest.mark.parametrize("policy", ["puct", "gumbel"])
def test_trees(problems, policy):
    with jax.enable_x64(True):
        equal, unequal = by_objective(equivalence.compare_trees(problems, policy, 32))
    assert list(equal) == ["r + beta log pi_ref, V*", "beta log(pi/pi_ref) + beta log pi_ref"]
    assert len(unequal) == 3 and max(row.agree for row in unequal.values()) < 0.25 * COUNT


def test_a_wrong_value_is_found(problems):
    """V* of another beta is enough to make the constants wrong, so a comparison cannot pass by chance."""
    with jax.enable_x64(True):
        wrong = replace(problems, values=problems.values + 1e-6 * jnp.arange(problems.values.shape[1]))
        row = equivalence.compare_trees(wrong, "gumbel", 32)[0]
    assert row.equal and not row.passed


def test_what_passes():
    row = Comparison("1 beam", "r", 200, 200, True, 1e-12)
    assert row.passed and replace(row, error=None).passed
    assert not replace(row, agree=199).passed and not replace(row, error=1e-9).passed
    assert not replace(row, equal=False).passed and replace(row, equal=False, agree=199).passed


def test_main_prints_the_table(monkeypatch, capsys):
    """The exit code is 1 if any row is not as predicted."""
    good = Comparison("puct", "r + beta log pi_ref, V*", 3, 3, True, 2e-14)
    asked = []

    def compare(problems, simulations):
        asked.append((problems.rewards.shape, problems.rewards.dtype, problems.beta, simulations))
        return [good, replace(good, equal=False, agree=3 - len(asked) % 2)]

    monkeypatch.setattr(equivalence, "compare", compare)
    assert equivalence.main(mdps=3, vocabulary=3, depth=2, beta=0.2, simulations=7) == 0
    assert equivalence.main(mdps=3, vocabulary=3, depth=2, beta=0.2, simulations=7) == 1
    assert asked[0] == ((3, 3, 3), np.float64, 0.2, 7)
    printed = capsys.readouterr().out
    assert printed.count("NO") == 1
    for text in ("3/3", "2/3", "2e-14", "all", "not all: NO"):
        assert text in printed


VOCABULARY, ROOM, BETA = 5, 4, 0.2
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def trained():
    """(model, params, reference params): eight steps of DPO on answers drawn at random, from a random reference."""
    model = CausalLM.from_hf(CONFIG)
    reference = jax.jit(model.init)(jax.random.key(0))
    keys = jax.tree.unflatten(
        jax.tree.structure(reference), jax.random.split(jax.random.key(1), len(jax.tree.leaves(reference)))
    )
    reference = jax.tree.map(lambda x, key: x + 0.5 * jax.random.normal(key, x.shape), reference, keys)
    texts = jnp.array(np.random.default_rng(2).integers(0, VOCABULARY, (12, 2 + ROOM)))  # two tokens of prompt
    texts = texts.at[6:, :2].set(texts[:6, :2])  # row 6 + i: the rejected answer to the prompt of row i

    def token_logps(params):
        logps = jax.nn.log_softmax(model.logits(params, texts))[:, 1:-1]
        return jnp.take_along_axis(logps, texts[:, 2:, None], axis=-1)[..., 0]

    known = token_logps(reference)

    def loss_fn(params):
        ratios = (token_logps(params) - known).reshape(2, 6, ROOM).swapaxes(0, 1)
        return losses.sigmoid(ratios, jnp.ones(ratios.shape, bool), beta=BETA)[0].mean()

    optimizer = optax.adam(3e-2)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=8))
    (params, _), found = run(reference)
    assert found[-1] < 0.5 * found[0]
    return model, params, reference


@pytest.mark.slow
@pytest.mark.thin("8")
@pytest.mark.parametrize("beams", [2, 8])
def test_beams_of_a_trained_transformer(trained, beams):
    """r and V are whatever DPO has made them; beta log(pi / pi_ref) + beta log pi_ref is in their class, with V = 0."""
    model, params, reference = trained
    prompts = jnp.array(np.random.default_rng(3).integers(0, VOCABULARY, (16, 3)))
    lengths, options = jnp.full(16, 3), BeamOptions(beams, ROOM, (0,))

    def search(objective):
        pair = Ensemble((model, model))
        return jax.device_get(beam_search(pair, (params, reference), prompts, lengths, options, objective=objective))

    likelihood, guided = search(Likelihood()), search(RegularisedReward(BETA))
    for name in ("tokens", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(guided, name), getattr(likelihood, name))
    valid = likelihood.finish > 0
    np.testing.assert_allclose(guided.score[valid], BETA * likelihood.logp[valid], rtol=0, atol=1e-5)
    np.testing.assert_allclose(guided.ref_logp[valid], likelihood.ref_logp[valid], rtol=0, atol=1e-5)
    if beams == 8:
        other = search(ImplicitReward(BETA))
        same = (other.tokens == likelihood.tokens).all((1, 2))
        assert same.mean() < 0.5
        valid = other.finish > 0
        np.testing.assert_allclose(other.score[valid], other.rewards(BETA)[valid], rtol=0, atol=1e-5)
