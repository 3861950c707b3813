"""What is measured of a diffusion model: gains, ranks and verdicts on made-up images."""

from dataclasses import replace

import numpy as np
import pytest

from qstar_jax.evaluation.insights.diffusion import Diffusion, Drawn, Held, measure_diffusion
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.insights import write_figure
from qstar_jax.report.insights.diffusion import facts, panels, tables

COUNT = 60
RNG = np.random.default_rng(0)
REWARD = RNG.normal(6, 0.5, COUNT)


def drawn(gain, read, kl):
    return Drawn(
        images=np.clip(RNG.normal(size=(COUNT, 64)), -1, 1),
        reward=REWARD + gain + RNG.normal(0, 0.1, COUNT),
        ink=REWARD / 20,
        read=np.arange(COUNT) < read * COUNT,
        kl=np.full(COUNT, kl),
        credit=RNG.normal(size=(COUNT, 64)),
        digits=np.arange(COUNT) % 3,
    )


def held(sign):
    returns = sign * REWARD + RNG.normal(0, 0.2, COUNT)
    return Held(returns=returns, kl=np.full(COUNT, 2.0), reward=REWARD, chosen=REWARD.reshape(-1, 2).argmax(-1))


def measure(tmp_path, *, weak_reads=0.3, sign=1.0):
    policies = {
        500.0: ({50: drawn(1.0, 0.9, 3.0), 100: drawn(1.2, 0.9, 4.0)}, held(1.0)),
        20.0: ({50: drawn(2.0, 0.5, 90.0), 100: drawn(2.5, weak_reads, 100.0)}, held(sign)),
    }
    settings = {"seed": 0, "steps": 100, "pairs": 10, "agreement": 0.7}
    return measure_diffusion(drawn(0.0, 0.9, 0.0), policies, range(3), **settings, out=tmp_path)


def test_policies_are_compared_with_the_reference_and_the_truth(tmp_path):
    record = measure(tmp_path)
    weak, strong = record.strengths
    assert (weak.beta_dpo, strong.beta_dpo) == (20.0, 500.0) and [p.steps for p in weak.points] == [50, 100]
    assert weak.points[-1].gain.mean == pytest.approx(2.5, abs=0.1) and strong.points[-1].gain.mean < 1.4
    assert weak.points[-1].read_gain.mean == pytest.approx(-0.6)
    assert strong.correlation.mean > 0.8 and strong.expected == Interval(-2.0, -2.0, -2.0)
    pairs = REWARD.reshape(-1, 2)
    assert strong.chosen.mean == pytest.approx(pairs.max(-1).mean(), abs=0.15)
    assert strong.rejected.mean == pytest.approx(pairs.min(-1).mean(), abs=0.15)
    assert len(record.images) == len(weak.credit) == len(weak.mean_credit) == 3 and len(weak.credit[0]) == 64
    assert np.abs(weak.mean_credit).max() < 1 < np.abs(weak.credit).max()  # means of 20 images
    assert Diffusion.read(tmp_path) == record


def test_verdicts(tmp_path):
    assert measure(tmp_path).finding().reproduced is True
    assert measure(tmp_path, sign=-1.0).finding().reproduced is False  # returns rank images the wrong way round
    assert measure(tmp_path, weak_reads=0.9).finding().reproduced is None  # nothing was over-optimized
    assert "beta_dpo 20: reward" in measure(tmp_path).finding().measured


def test_the_record_is_shown(tmp_path):
    record = measure(tmp_path)
    titles = [panel.title for panel in panels(record)]
    assert titles[0] == "True reward against divergence" and titles[-1] == "Rewards of pixels, beta_dpo 500"
    assert "at 100.0 nats" in panels(record)[0].alt
    assert [len(table.rows) for table in tables(record)] == [5, 2] and "10 pairs" in facts(record)[0]
    assert write_figure(record, tmp_path).stat().st_size > 10_000
    other = replace(record, strengths=record.strengths[:1])
    assert panels(other)[-1].title == "Rewards of pixels, beta_dpo 20"
