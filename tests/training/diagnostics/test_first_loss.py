import math

import pytest

from qstar_jax.training.diagnostics.first_loss import check_first_loss


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
