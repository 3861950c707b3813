"""The check of an accelerator finds what is wrong on it, here on one of two sides that are both CPUs."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.extend(str(Path(__file__).parents[level]) for level in (0, 1))
import check_attention
import check_families
from sides import distance

FLOAT32 = [f"float32_{key}" for key in ("loss", "rewards", "gradient", "step")]


@pytest.mark.slow
def test_a_family_that_differs_is_found():
    def change(params):
        """Scales the last norm by 1.001."""
        return params | {"norm": jax.tree.map(lambda x: x * 1.001, params["norm"])}

    record = check_families.check_family("qwen3", change)
    assert not record["ok"]
    assert all(record[key] > check_families.FLOAT32_BOUND for key in FLOAT32)
    assert "float32_gradient" in record["error"] and "float32_beams" in record["error"]


def test_attention_that_sees_what_it_must_not_is_found(monkeypatch):
    (case,) = check_attention.TINY_CASES
    assert check_attention.check_unseen("blockwise", "float32", case)["ok"]
    blind = check_attention.masked_attention

    def leaky(mask, *arguments, **options):
        return blind(type(mask)(mask.blocks, mask.branches * 0), *arguments, **options)

    monkeypatch.setattr(check_attention, "masked_attention", leaky)
    jax.clear_caches()
    record = check_attention.check_unseen("blockwise", "float32", case)
    assert not record["ok"]
    assert "reaches tokens that must not see it" in record["error"]
    assert "the gradient of k reaches other texts" in record["error"]


def test_distance():
    zeros, ones = np.zeros(3), np.ones(4)
    assert distance([ones, zeros], [ones, zeros]) == 0
    np.testing.assert_allclose(distance([ones * 1.5, zeros], [ones, zeros]), 0.5)
    assert distance([ones * np.nan, zeros], [ones, zeros]) == np.inf
    assert distance([ones, zeros + 1e-9], [ones, zeros]) < 1e-6  # 0 but for rounding
