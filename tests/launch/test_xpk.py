"""The scripts for GKE, with stand-ins for xpk and qstar that write down what they were told."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
WRITE_DOWN = f"""#!{sys.executable}
import json, os, sys
jax = {{name: value for name, value in os.environ.items() if name.startswith("JAX_")}}
print(json.dumps([sys.argv[1:], jax]))
"""
GIVEN = ["--cluster", "c", "--workload", "w", "--docker-image", "image", "--tpu-type", "v5litepod-256"]
OURS = ["--max-restarts", "50", "--restart-on-exit-codes", "75", "--termination-grace-period-seconds", "300"]


@pytest.fixture
def call(tmp_path):
    """`call(script, *words, **variables)`: what came of it."""
    for name in ("xpk", "qstar"):
        (tmp_path / name).write_text(WRITE_DOWN)
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"

    def run(script, *words, **variables):
        words = [LAUNCH / script, *words]
        return subprocess.run(words, env=environment | variables, cwd=LAUNCH.parent, capture_output=True, text=True)

    return run


def test_what_xpk_is_told(call):
    words = ["dpo", "--out", "gs://bucket/a run", "--mesh.data=2", "--judge.rubric", "", "--widths", "[1, 2]"]
    (*told, command), _ = json.loads(call("xpk.sh", *GIVEN, "--max-restarts", "3", "--", *words).stdout)
    assert told == ["workload", "create", *OURS, *GIVEN, "--max-restarts", "3", "--command"]
    assert command == (
        "exec launch/gke_host.sh dpo --out 'gs://bucket/a run' --mesh.data=2 --judge.rubric '' --widths '[1, 2]'"
    )
    # Read as a double-quoted value of YAML and by a shell, it is what was given.
    yaml = pytest.importorskip("yaml")
    command = yaml.safe_load(f'"{command}"').replace("launch/gke_host.sh", "printf '<%s>'").replace("exec ", "")
    assert subprocess.check_output(["bash", "-c", command], text=True) == "".join(f"<{word}>" for word in words)


@pytest.mark.parametrize("word", ["a 'b'", 'a "b"', "a\\b", "$HOME", "`id`", "a\nb"])
def test_what_would_not_reach_the_run_is_refused(call, word):
    done = call("xpk.sh", *GIVEN, "--", "dpo", "--out", word)
    assert done.returncode == 2 and "--config" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("words", [[], GIVEN, [*GIVEN, "--"]])
def test_without_a_command_it_says_how(call, words):
    done = call("xpk.sh", *words)
    assert done.returncode == 2 and "-- dpo" in done.stderr and done.stdout == ""


XPK = {"NNODES": "4", "NODE_RANK": "1", "JAX_COORDINATOR_ADDRESS": "w-slice-job-0-0.w", "JAX_COORDINATOR_PORT": "6002"}


@pytest.mark.parametrize(
    ("variables", "jax"),
    [
        ({}, {}),  # TPUs
        (
            XPK,
            {
                "JAX_NUM_PROCESSES": "4",
                "JAX_PROCESS_ID": "1",
                "JAX_COORDINATOR_ADDRESS": "w-slice-job-0-0.w:6002",
                "JAX_COORDINATOR_PORT": "6002",
            },
        ),
    ],
)
def test_a_container_tells_jax_of_its_partners(call, variables, jax):
    words, told = json.loads(call("gke_host.sh", "dpo", "--out", "a run", **variables).stdout)
    assert words == ["dpo", "--out", "a run", "--resume", "auto", "--mesh.multi_process", "true"]
    assert told == jax


def test_sigterm_reaches_the_run(tmp_path):
    """As xpk has it: a shell starts the command in the background, and hands the signal to what it has started."""
    (tmp_path / "qstar").write_text(
        "#!/bin/bash\ntrap 'echo saved; exit 75' TERM\necho up\nwhile :; do sleep 0.05; done\n"
    )
    (tmp_path / "qstar").chmod(0o755)
    wrapper = "t() (kill -TERM $! 2>/dev/null); trap t TERM; (exec launch/gke_host.sh dpo) & wait $!; wait $!"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    pipe = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | path, "cwd": LAUNCH.parent}
    with subprocess.Popen(["bash", "-c", wrapper], **pipe) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 75


def test_the_image_has_what_xpk_calls():
    text = (LAUNCH / "Dockerfile").read_text()
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    for source in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((LAUNCH.parent / name).exists() for name in source.split())
    assert "COPY . .\n" in text and "launch" not in ignored and os.access(LAUNCH / "gke_host.sh", os.X_OK)
