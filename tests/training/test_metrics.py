import statistics

import pytest

from qstar_jax.training.metrics import mean_metrics


def test_means_weigh_sums_by_their_denominators():
    parts = [{"a": (6.0, 3.0), "b": (1.0, 1.0)}, {"a": (1.0, 1.0), "b": (0.0, 0.0)}]
    assert mean_metrics(parts) == {"a": 7 / 4, "b": 1.0}
    assert mean_metrics([{"a": (0.0, 0.0), "squares/a": (0.0, 0.0), "b": (2.0, 1.0)}]) == {"b": 2.0}


def test_squares_become_the_standard_error_of_the_mean():
    values = [1.0, 2.0, 4.0, 5.0]
    parts = [{"a": (sum(x), 2.0), "squares/a": (sum(v * v for v in x), 2.0)} for x in (values[:2], values[2:])]
    assert mean_metrics(parts) == {"a": 3.0, "a_stderr": pytest.approx(statistics.stdev(values) / 2)}
    assert mean_metrics([{"a": (3.0, 1.0), "squares/a": (9.0, 1.0)}]) == {"a": 3.0}  # undefined for one row


def test_means_add_up_in_float64():
    # 2^24 + 1 is no float32.
    assert mean_metrics([{"a": (2.0**24, 1.0)}, {"a": (1.0, 0.0)}])["a"] == 2**24 + 1
