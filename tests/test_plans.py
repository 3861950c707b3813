"""The plans in configs/plans/: all are there, fit, belong to their configurations, and are what the table says."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKE = runpy.run_path(str(ROOT / "configs/plans/make.py"), run_name="make")


def assert_holds(found: dict, given: dict):
    for name, value in given.items():
        if isinstance(value, dict):
            assert_holds(found[name], value)
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("run", MAKE["PLANS"], ids=lambda run: MAKE["name_of"](*run[:3]))
def test_each_is_of_its_configuration_and_fits(run):
    config, model, topology, options = run
    plan = json.loads((ROOT / f"configs/plans/{MAKE['name_of'](config, model, topology)}.json").read_text())
    assert plan["fits"] and plan["topology"] == topology and Path(plan["config"]["model"]).name == model
    given = yaml.safe_load((ROOT / f"configs/{config}.yaml").read_text())
    for name, value in zip(options[::2], options[1::2], strict=True):
        section, option = name.removeprefix("--").split(".")
        given.setdefault(section, {})[option] = int(value)
    for name in {"model", "out"} & given.keys():
        del given[name]  # the plan's own
    assert_holds(plan["config"], given)


def test_the_readme_has_their_table():
    assert MAKE["table"]() in (ROOT / "configs/README.md").read_text(encoding="utf-8")
