"""A few commands that are killed, and go on as if they had not been. See `__main__` for many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on_as_if_it_had_not_been():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.faults", "--verb=score", "--kills=2", "--verbose"]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0 and "2 tried, 2 exact" in done.stdout, done.stdout + done.stderr
