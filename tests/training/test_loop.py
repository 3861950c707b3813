import math
import statistics

import pytest

from qstar_jax.training.diagnostics.first_loss import check_first_loss
from qstar_jax.training.metrics import mean_metrics


def metrics(loss):
    return {"loss": loss, "rewards/chosen": 0.25, "rewards/rejected": -0.5}


def test_the_loss_of_a_policy_that_is_its_reference_is_accepted():
    check_first_loss(metrics(math.log(2)), math.log(2))
    check_first_loss(metrics(math.log(2) + 9e-4), math.log(2))
    check_first_loss(metrics(25.02), 25.0)  # ipo: relative to what is expected


@pytest.mark.parametrize("loss", [math.log(2) + 2e-3, math.log(2) - 2e-3, 0.0])
def test_any_other_first_loss_is_refused_with_what_was_found(loss):
    with pytest.raises(
        RuntimeError, match=r"expected 0\.693147.*rewards/chosen 0\.25.*rewards/rejected -0\.5.*reference"
    ):
        check_first_loss(metrics(loss), math.log(2))


def test_means_weigh_sums_by_their_denominators():
    parts = [{"a": (6.0, 3.0), "b": (1.0, 1.0)}, {"a": (1.0, 1.0), "b": (0.0, 0.0)}]
    assert mean_metrics(parts) == {"a": 7 / 4, "b": 1.0}


def test_squares_become_the_standard_error_of_the_mean():
    values = [1.0, 2.0, 4.0, 5.0]
    parts = [{"a": (sum(x), 2.0), "squares/a": (sum(v * v for v in x), 2.0)} for x in (values[:2], values[2:])]
    found = mean_metrics(parts)
    assert found == {"a": 3.0, "a_stderr": pytest.approx(statistics.stdev(values) / 2)}
    assert mean_metrics([{"a": (3.0, 1.0), "squares/a": (9.0, 1.0)}]) == {"a": 3.0}  # one row says nothing of it


def test_means_add_up_in_float64():
    # 2^24 + 1 is no float32.
    assert mean_metrics([{"a": (2.0**24, 1.0)}, {"a": (1.0, 0.0)}])["a"] == 2**24 + 1
