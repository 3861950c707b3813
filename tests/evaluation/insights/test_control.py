import pytest

from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.control import Control, ControlRun, Outcome, measure_control
from qstar_jax.evaluation.insights.decline import DeclineRun
from qstar_jax.evaluation.intervals import Interval


def ended(arm, seed, chosen, success=0.5):
    curves = {"chosen": [0.0, chosen], "rejected": [0.0, -2.0], "margin": [0.0, 1.0], "reference": [0.0, -1.5]}
    rewards = DeclineRun(f"{arm}, seed {seed}", "f", 0.1, True, [0, 9], curves, {"chosen": [0.0, 0.1]}, kind="segments")
    outcome = Outcome((0, 9), (Interval(0.1, 0.0, 0.2), Interval(success, success - 0.1, success + 0.1)))
    return ControlRun(arm, seed, rewards, {"chosen": (-9, -8), "rejected": (-9, -7)}, 0.7, {"success": outcome})


@pytest.mark.parametrize(
    ("ends", "reproduced"),
    [
        ([(-1.0, 1.0), (-1.0, 0.5)], True),
        ([(-1.0, 1.0), (1.0, 1.0)], False),  # one seed that contradicts is enough
        ([(-1.0, 1.0), (-0.1, 1.0)], None),  # noise hides whether it fell
        ([(-1.0, 1.0), (-1.0, None)], None),  # an arm is missing
    ],
)
def test_the_finding_is_about_all_seeds(ends, reproduced):
    runs = [
        ended(arm, seed, chosen)
        for seed, pair in enumerate(ends)
        for arm, chosen in zip(("with_bc", "without_bc"), pair, strict=True)
        if chosen is not None
    ]
    control = Control("bin-picking-v3", tuple(runs))
    found = control.finding()
    assert found.reproduced is reproduced and control.seeds == (0, 1)
    assert "chosen -1.000 +- 0.200" in found.measured and "cloned data would be at -1.500" in found.measured
    assert "Success at the end, seed 0: with cloning 0.5, without cloning 0.5." in found.measured
    assert found.command == "qstar control --task bin-picking-v3"
    assert Control.from_json(control.to_json(), "x") == control


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no summary\.json; expected the folder of `qstar control`"):
        measure_control(tmp_path)
