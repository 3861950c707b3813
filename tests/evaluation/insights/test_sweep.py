import numpy as np
import pytest

from qstar_jax.config import SweepConfig
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.sweep import Outcome, Setting, Sweep, settings, sweep_run
from qstar_jax.evaluation.intervals import Interval


def outcome(row, win, length=3):
    return Outcome(row, win, length, logp=-1.0 * length, implicit_reward=0.5, true_reward=None, truncated=length > 5)


def run(rates, count=100, seed=0, undecided=0):
    """Outcomes whose chance to win is given for each setting; the first few may be undecided."""
    rng = np.random.default_rng(seed)
    draws = rng.random(count)  # one for all settings, so that they are paired
    return {
        setting: [outcome(i, None if i < undecided else float(draws[i] < rate)) for i in range(count)]
        for setting, rate in rates.items()
    }


SAMPLED, GREEDY, FIVE, TWENTY = Setting(1, "sampled"), Setting(1, "greedy"), Setting(5, "beam"), Setting(20, "beam")


def test_settings_are_all_that_was_asked_for_and_both_controls():
    found = settings(SweepConfig(model="m", out="o", widths=[5, 2], seeds=[3, 4]))
    assert [s.folder for s in found] == ["sampled-3", "sampled-4", "greedy", "beams-2", "beams-5"]


def test_options_of_the_sweep_reach_the_decoder():
    config = SweepConfig(model="m", out="o", temperature=0.7, top_k=9, max_new_tokens=11, stop=["\n"])
    sampled, greedy, beam = (s.options(config) for s in (Setting(1, "sampled", 2), GREEDY, FIVE))
    assert (sampled.method, sampled.temperature, sampled.top_k, sampled.seed) == ("sample", 0.7, 9, 2)
    assert greedy.method == "greedy" and (beam.method, beam.beams) == ("beam", 5)
    assert all(o.max_new_tokens == 11 and o.stop == ["\n"] for o in (sampled, greedy, beam))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [1, 5]}, r"--widths \[1, 5\]: .* at least 2; width 1 is always tried"),
        ({"widths": []}, "--widths"),
        ({"widths": [5, 5]}, "different numbers"),
        ({"seeds": []}, "--seeds"),
        ({"seeds": [-1]}, "--seeds"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        settings(SweepConfig(model="m", out="o", **options))


def test_samples_of_several_seeds_are_averaged_for_each_prompt():
    seeds = {
        Setting(1, "sampled", seed): [outcome(0, win), outcome(1, 1.0)] for seed, win in enumerate((0.0, 1.0, 0.5))
    }
    beams = {GREEDY: [outcome(0, 0.0), outcome(1, 0.0)], FIVE: [outcome(0, 1.0), outcome(1, 1.0)]}
    found = sweep_run(seeds | beams, name="n", model="m", beta=0.1)
    points = {(p.decoder, p.width): p for p in found.points}
    assert points["sampled", 1].win_rate.mean == 0.75 and len(points) == 3
    assert found.differences["5 beams - sampled"].mean == 0.25
    assert found.differences["5 beams - greedy"].mean == 1.0


def test_differences_are_paired_by_prompt():
    rates = {SAMPLED: 0.5, GREEDY: 0.6, FIVE: 0.7, TWENTY: 0.7}
    found = sweep_run(run(rates, 400), name="n", model="m", beta=0.1)
    gain = found.differences["5 beams - greedy"]
    assert 0 < gain.low < gain.mean < gain.high < 0.2  # unpaired it would reach below 0.05
    assert found.differences["20 beams - 5 beams"] == Interval(mean=0.0, low=0.0, high=0.0)


def test_undecided_comparisons_count_for_nothing_and_are_counted():
    found = sweep_run(run({SAMPLED: 1.0, GREEDY: 1.0, FIVE: 1.0}, 10, undecided=4), name="n", model="m", beta=0.1)
    assert all(p.win_rate.mean == 1.0 and p.undecided == 4 for p in found.points)
    nothing = sweep_run(run({SAMPLED: 1.0, GREEDY: 1.0, FIVE: 1.0}, 4, undecided=4), name="n", model="m", beta=0.1)
    assert all(p.win_rate is None for p in nothing.points) and not any(nothing.differences.values())


def test_what_is_not_known_is_none_and_what_was_cut_is_counted():
    outcomes = {s: [outcome(0, 1.0, length=9), outcome(1, 1.0)] for s in (SAMPLED, GREEDY, FIVE)}
    (point, *_) = sweep_run(outcomes, name="n", model="m", beta=0.1).points
    assert point.true_reward is None and point.truncated == 0.5 and point.length.mean == 6.0


def test_without_five_beams_the_middle_width_speaks():
    rates = dict.fromkeys((SAMPLED, GREEDY, Setting(2, "beam"), Setting(3, "beam"), Setting(4, "beam")), 0.5)
    assert sweep_run(run(rates), name="n", model="m", beta=0.1).pivot == 3


@pytest.mark.parametrize(
    ("rates", "reproduced"),
    [((0.3, 0.5, 0.8), True), ((0.3, 0.8, 0.5), False), ((0.3, 0.5, 0.5), None)],
)
def test_the_verdict_follows_the_numbers(rates, reproduced):
    found = sweep_run(run(dict(zip((SAMPLED, GREEDY, FIVE), rates, strict=True))), name="n", model="m", beta=0.1)
    finding = Sweep("j", prompts=100, seeds=[0], runs=(found,)).finding()
    assert finding.reproduced is reproduced and "against greedy" in finding.measured
