import pytest

from qstar_jax.errors import InputError
from qstar_jax.evaluation.judges.cost import Budget, Estimate, estimate_tokens
from qstar_jax.evaluation.judges.replies import Reply


def estimate(dollars):
    return Estimate(4, 2, 1000, 400, dollars, 2)


def test_tokens_are_estimated_from_bytes():
    assert estimate_tokens([{"role": "user", "content": "x" * 300}]) == 110
    assert estimate_tokens([{"role": "user", "content": "é"}, {"role": "user", "content": ""}]) == 1 + 20


def test_what_is_said_beforehand():
    text = (
        "4 calls (2 more are kept from before), about 1,000 tokens in (3 bytes each), at most 400 out (max_tokens each)"
    )
    again = "; replies that do not decide are asked for again, at most 2x"
    assert str(estimate(None)) == text + again
    assert str(estimate(0.5)) == text + ", at most about $0.5000" + again
    assert str(Estimate(0, 3, 0, 0, None, 2)) == "no calls: 3 replies are kept from before"


def test_prices_are_of_a_million_tokens():
    assert Budget(30.0, 60.0).dollars(1000, 400) == pytest.approx(0.03 + 0.024)
    assert Budget().dollars(1000, 400) is None


def test_the_limit_counts_what_was_spent():
    budget = Budget(1e6, 1e6, max_cost=10.0)  # a dollar a token
    budget.check(estimate(10.0))
    with pytest.raises(InputError, match=r"max_cost \$10\.0000 is less than what judging may cost: 4 calls"):
        budget.check(estimate(10.1))
    reserved = budget.reserve(3, 3)
    with pytest.raises(InputError, match=r"used up .*spent: \$6\.0000"):
        budget.reserve(3, 3)
    budget.settle(reserved, Reply("A", 1, 1))
    assert budget.spent == pytest.approx(2.0)
    budget.settle(budget.reserve(3, 3), None)
    assert budget.spent == pytest.approx(2.0)
    budget.settle(budget.reserve(3, 3), Reply("A"))  # a server that does not count
    assert budget.spent == pytest.approx(8.0)
    with pytest.raises(InputError, match=r"after \$8\.0000 already spent"):
        budget.check(estimate(2.1))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((1.0, None, None), "belong together"),
        ((None, None, 1.0), "no effect without judge.price_in"),
        ((-1.0, 1.0, None), "price_in -1.0"),
        ((float("nan"), 1.0, None), "price_in nan"),
    ],
)
def test_prices_that_cannot_be(given, match):
    with pytest.raises(InputError, match=match):
        Budget(*given)
