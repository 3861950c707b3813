import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax import losses
from qstar_jax.mdp import TokenScores

spec = importlib.util.spec_from_file_location("trl_runner", Path(__file__).with_name("trl_runner.py"))
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)

SEEDS = [0, 1, 2]
CASES = [pytest.param(case, id=case.id) for case in runner.CASES]
EACH_ONCE = [f"{case.id}-{SEEDS[i % len(SEEDS)]}" for i, case in enumerate(runner.CASES)]
GOLDEN_CASES = [pytest.param(case, id=case.id) for case in runner.CASES if case.golden]
# Of one row, the mean over the batch's tokens is the mean over the response's.
BY_ANSWER = {"normalize": "answer_tokens"}
ROW_CASES = [pytest.param(case, id=case.id) for case in runner.CASES if not case.couples_rows] + [
    pytest.param(runner.Case(loss, BY_ANSWER, trainer), id=f"{trainer}-{loss}")
    for loss, trainer in (("sft", "dpo"), ("cpo", "cpo"), ("orpo", "orpo"))
]
# TRL logs rewards of log-ratios even where the loss reads none.
LOGGED_CASES = [case for case in GOLDEN_CASES if case.values[0].trainer == "dpo" and case.values[0].loss != "sft"]
RUBBISH = 50.0


@pytest.fixture(scope="module")
def golden():
    return runner.read_golden()


@pytest.fixture(scope="module")
def run_trl():
    pytest.importorskip("trl")
    return runner.run


def run_ours(case, batch):
    """Loss of each row, gradient of their mean and metrics, in float64."""
    loss = losses.make_loss(case.loss, **case.options)
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x) for name, x in batch.items()}
        mask, kl_mask = arrays["mask"], arrays["kl_mask"]
        kl_ratios = jnp.where(kl_mask, arrays["kl_logp"] - arrays["kl_ref_logp"], RUBBISH)
        ref_logp = jnp.zeros_like(arrays["logp"]) if case.trainer == "cpo" else arrays["ref_logp"]
        unpaired = case.settings.get("loss_type") == "apo_zero_unpaired"
        known = {
            "log_sum_sq": jnp.where(mask, arrays["log_sum_sq"], RUBBISH),
            "baseline": jnp.zeros(()) if unpaired else losses.kto_baseline(kl_ratios, kl_mask),
        }

        def evaluate(logp):
            scores = TokenScores(logp, jnp.where(mask, ref_logp, -RUBBISH), None, mask)
            extra = {name: known[name] for name in loss.extra_arrays}
            values, metrics = loss(scores, labels=arrays["labels"], **extra)
            return values.mean(), (values, metrics)

        dirty = jnp.where(mask, arrays["logp"], RUBBISH)
        gradient, (values, metrics) = jax.grad(evaluate, has_aux=True)(dirty)
        assert values.dtype == gradient.dtype == jnp.float64
        return np.asarray(values), np.asarray(gradient), jax.device_get(metrics)


def assert_same(case, batch, expected):
    values, gradient, _ = run_ours(case, batch)
    np.testing.assert_allclose(values.mean(), expected.loss, rtol=case.precision, atol=case.precision)
    np.testing.assert_allclose(gradient, expected.gradient, rtol=case.precision, atol=case.precision)
    assert np.any(expected.gradient)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_equals_what_trl_once_gave(case, golden):
    assert_same(case, golden["batch"], golden["results"][case.id])


def test_every_golden_number_is_compared(golden):
    assert set(golden["results"]) == {case.id for case in runner.CASES if case.golden}


def test_golden_numbers_tell_losses_apart(golden):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(runner.Case("ipo_sum"), golden["batch"], golden["results"]["dpo-ipo"])


@pytest.mark.parity
def test_golden_numbers_are_those_of_the_installed_trl(golden, run_trl):
    for case in runner.CASES:
        if case.golden:
            found, expected = run_trl(case, golden["batch"]), golden["results"][case.id]
            same = {"rtol": 0, "atol": case.precision, "err_msg": case.id}
            np.testing.assert_allclose(found.loss, expected.loss, **same)
            np.testing.assert_allclose(found.gradient, expected.gradient, **same)


@pytest.mark.parity
@pytest.mark.thin(*EACH_ONCE)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_trl(case, seed, run_trl):
    batch = runner.random_batch(seed)
    assert_same(case, batch, run_trl(case, batch))


@pytest.mark.parity
@pytest.mark.parametrize("case", ROW_CASES)
def test_each_row_equals_trl_on_that_row_alone(case, run_trl):
    batch = runner.random_batch(0)
    alone = [run_trl(case, {name: x[[row]] for name, x in batch.items()}).loss for row in range(len(batch["mask"]))]
    np.testing.assert_allclose(run_ours(case, batch)[0], alone, rtol=case.precision, atol=case.precision)


@pytest.mark.parity
@pytest.mark.parametrize("case", LOGGED_CASES)
def test_metrics_are_those_that_trl_logs(case, run_trl):
    batch = runner.random_batch(1)
    log, metrics = run_trl(case, batch).log, run_ours(case, batch)[2]
    found = [*metrics.rewards.mean(0), metrics.margins.mean(), metrics.accuracies.mean()]
    expected = [log[f"rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("seed, clipped", [(0, False), (1, True)])
def test_kto_baseline_equals_that_of_trl(seed, clipped, run_trl):
    batch = runner.random_batch(seed)
    with jax.enable_x64(True):
        ratios = jnp.asarray(np.where(batch["kl_mask"], batch["kl_logp"] - batch["kl_ref_logp"], RUBBISH))
        found = float(losses.kto_baseline(ratios, jnp.asarray(batch["kl_mask"])))
    np.testing.assert_allclose(found, run_trl(runner.Case("kto", trainer="kto"), batch).log["kl"], rtol=1e-6)
    assert (found == 0) == clipped


@pytest.mark.parity
def test_comparison_tells_losses_apart(run_trl):
    batch = runner.random_batch(0)
    expected = run_trl(runner.Case("ipo"), batch)
    assert_same(runner.Case("ipo"), batch, expected)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(runner.Case("ipo_sum"), batch, expected)


@pytest.mark.parity
def test_sigmoid_smooths_labels_and_that_of_trl_does_not(run_trl):
    batch, smoothed = runner.random_batch(0), runner.Case("sigmoid", {"label_smoothing": 0.2})
    expected = run_trl(smoothed, batch)
    assert expected.loss == run_trl(runner.Case("sigmoid"), batch).loss
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(smoothed, batch, expected)


@pytest.mark.parity
def test_every_dpo_loss_of_trl_is_here_and_compared(run_trl):
    names = runner.dpo_loss_types()
    assert len(names) >= 15
    assert names <= set(losses.LOSSES)
    assert names <= {case.loss for case in runner.CASES if case.trainer == "dpo" and isinstance(case.loss, str)}
