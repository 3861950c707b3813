"""The script for Slurm, with stand-ins that write down what they were told; `run_slurm.sh` runs it for real."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"


@pytest.mark.parametrize(("code", "requeues"), [(0, False), (2, False), (75, True)])
def test_a_run_that_was_stopped_is_queued_again(code, requeues, tmp_path):
    for name, ends in (("srun", code), ("scontrol", 0)):
        command = tmp_path / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >> "$TOLD"\nexit {ends}\n')
        command.chmod(0o755)
    (tmp_path / "activate").write_text('echo activated >> "$TOLD"\n')
    told = {"TOLD": str(tmp_path / "told"), "ACTIVATE": str(tmp_path / "activate"), "SLURM_JOB_ID": "7"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", SCRIPT, "dpo", "--out", "a run"], env=os.environ | told | path).returncode == code
    assert (tmp_path / "told").read_text().splitlines() == [
        "activated",
        "srun qstar dpo --out a run --resume auto --mesh.multi_process true",
        *(["scontrol requeue 7"] if requeues else []),
    ]


def test_tasks_see_all_gpus_of_their_node():
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert not any(option.startswith(("--gpus-per-task", "--gpu-bind")) for option in options)
    assert {"--requeue", "--open-mode=append"} <= set(options)
