"""The script for several processes, with a stand-in for qstar."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "processes.sh"
QSTAR = """#!/bin/sh
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*"
[ "$JAX_PROCESS_ID" != "$FAILS" ] || exit 3
"""


@pytest.mark.parametrize(("fails", "code"), [("none", 0), ("0", 3), ("1", 3), ("2", 3)])
def test_each_process_runs_the_command_and_each_failure_counts(fails, code, tmp_path):
    (tmp_path / "qstar").write_text(QSTAR)
    (tmp_path / "qstar").chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "N": "3", "PORT": "777", "FAILS": fails}
    done = subprocess.run(["bash", SCRIPT, "dpo", "--out", "a"], env=os.environ | given, stdout=-1, text=True)
    assert done.returncode == code
    said = "of 3 at 127.0.0.1:777: dpo --out a --mesh.multi_process true"
    assert sorted(done.stdout.splitlines()) == [f"{i} {said}" for i in range(3)]
