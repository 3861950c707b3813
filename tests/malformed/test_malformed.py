"""Every malformed input is answered by one sentence and exit code 2: a sample of them. See `__main__` for all."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

sys.path.append(str(Path(__file__).parent))
from case import Place, problem
from table import CASES

from qstar_jax.cli.main import main

_LIGHT = [case for case in CASES if not case.heavy]
_SAMPLE = Random(0).sample([ascii(case.name) for case in _LIGHT], 36)


@pytest.mark.thin(*_SAMPLE)
@pytest.mark.parametrize("case", _LIGHT, ids=lambda case: ascii(case.name))
def test_a_malformed_input_is_refused(case, tmp_path, capfd, one_device_only):
    words = case.write(Place(tmp_path), Random(f"0 {case.name}"))
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    err = capfd.readouterr().err
    assert problem(code, err, case.says) is None


@pytest.mark.slow
def test_inputs_that_would_take_all_time_or_memory():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.malformed", "--heavy"]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
