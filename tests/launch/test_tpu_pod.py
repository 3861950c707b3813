"""The script for TPU slices, with a stand-in for gcloud that writes down what it was told, and plays one host."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu_pod.sh"
ALL = ["--node=all", "--worker=all"]
# What is said goes to a file, a list per call. Files are copied home, and commands run there.
GCLOUD = """
import json, os, shutil, subprocess, sys
words = sys.argv[1:]
with open(os.environ["TOLD"], "a") as told:
    told.write(json.dumps(words) + "\\n")
if words[3] == "scp":
    shutil.copy(words[4], os.environ["HOME"])
if words[3] == "ssh":
    sys.exit(subprocess.run(["bash", "-c", words[words.index("--command") + 1]], cwd=os.environ["HOME"]).returncode)
"""
# The host's Python: of uv it makes an environment whose `qstar` waits for Ctrl-C, saves for a while, and ends with 130.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$HOME/python"
[ "$3" != venv ] || { mkdir -p .venv/bin; cp "$HOME/bin/command" .venv/bin/qstar; }
"""
QSTAR = """#!/usr/bin/env bash
trap 'sleep 0.3; echo saved; exit 130' INT
printf '<%s>' "$@"; echo
while true; do sleep 0.05; done
"""


@pytest.fixture
def pod(tmp_path):
    """`pod(*words, **variables)`: what the script ends with, and what gcloud was told by it."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in (("gcloud", f"#!{sys.executable}{GCLOUD}"), ("python3", PYTHON), ("command", QSTAR)):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    told = tmp_path / "told"
    environment = {name: value for name, value in os.environ.items() if name not in ("TMUX", "NODES", "EXTRAS")}
    environment |= {"PATH": f"{bin}:{os.environ['PATH']}", "HOME": str(tmp_path), "TMUX_TMPDIR": str(tmp_path)}
    environment |= {"TOLD": str(told), "TPU": "pod", "ZONE": "us-west4-a"}

    def run(*words, **variables):
        told.write_text("")
        done = subprocess.run(["bash", SCRIPT, *words], env=environment | variables, capture_output=True, text=True)
        return done, [json.loads(line) for line in told.read_text().splitlines()]

    run.environment = environment
    yield run
    if shutil.which("tmux"):
        subprocess.run(["tmux", "kill-server"], env=environment, capture_output=True)


def queued(verb, *words):
    return ["compute", "tpus", "queued-resources", verb, *words]


SLICE = {"TYPE": "v5litepod-16", "VERSION": "v2-alpha-tpuv5-lite"}
SLICE_WORDS = ["--accelerator-type", "v5litepod-16", "--runtime-version", "v2-alpha-tpuv5-lite"]


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (["create"], SLICE, queued("create", "pod", "--zone", "us-west4-a", *SLICE_WORDS, "--node-id", "pod")),
        (
            ["create", "--spot", "--network=a b"],
            SLICE | {"NODES": "2"},
            queued(
                "create", "pod", "--zone", "us-west4-a", *SLICE_WORDS, "--node-count", "2", "--spot", "--network=a b"
            ),
        ),
        (["state"], {}, queued("describe", "pod", "--zone", "us-west4-a", "--format", "value(state.state)")),
        (["delete"], {}, queued("delete", "pod", "--zone", "us-west4-a", "--force")),
    ],
)
def test_what_gcloud_is_told(pod, words, variables, expected):
    done, told = pod(*words, **variables)
    assert done.returncode == 0 and told == [expected]


@pytest.mark.parametrize(
    ("words", "variables", "says"),
    [
        ([], {}, "tpu_pod.sh run dpo"),
        (["remove"], {}, "tpu_pod.sh delete"),
        (["run"], {}, "tpu_pod.sh run dpo"),
        (["state"], {"ZONE": ""}, "ZONE"),
        (["create"], {}, "TYPE"),
    ],
)
def test_what_is_missing_is_said_before_gcloud_is_asked(pod, words, variables, says):
    done, told = pod(*words, **variables)
    assert done.returncode != 0 and says in done.stderr and told == []


def within_seconds(seconds, true):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux")
@pytest.mark.skipif(not (SCRIPT.parents[1] / ".git").exists(), reason="no clone")
def test_a_run_stays_when_this_machine_leaves(pod, tmp_path):
    log, asked = tmp_path / "qstar.log", tmp_path / "python"
    words = ["dpo", "--out", "a 'run'", "--train.steps=3"]
    done, told = pod("run", *words)
    assert done.returncode == 0, done.stderr
    assert [call[3] for call in told] == ["scp", "ssh"] and Path(told[0][4]).name == "qstar_jax.tar.gz"
    assert told[0][5:] == ["pod:", "--zone", "us-west4-a", *ALL]
    assert told[1][4:-1] == ["pod", "--zone", "us-west4-a", *ALL, "--command"]
    assert (tmp_path / "qstar_jax" / "qstar_jax" / "mdp.py").exists() and not (
        tmp_path / "qstar_jax" / "tests"
    ).exists()

    # The command has come to an end here, and the run goes on there, with the words that were given.
    expected = [*words, "--resume", "auto", "--mesh.multi_process", "true"]
    within_seconds(20, lambda: log.exists() and log.read_text() == "".join(f"<{word}>" for word in expected) + "\n")
    installed = [
        "-m pip install -q --user uv",
        "-m uv venv -q --clear --python 3.12 .venv",
        "-m uv pip install -q --python .venv/bin/python -e .[tpu]",
    ]
    assert asked.read_text().splitlines() == installed

    # A second run is refused, and `stop` lets the first one save.
    done, _ = pod("run", *words)
    assert done.returncode != 0 and "stop it first" in done.stderr
    assert pod("stop")[0].returncode == 0
    within_seconds(20, lambda: log.read_text().endswith("qstar dpo ended with 130\n"))
    assert "saved\n" in log.read_text()

    # Modules that are gone go; runs stay; nothing is installed again, unless what is needed has changed.
    gone, kept = tmp_path / "qstar_jax" / "qstar_jax" / "gone.py", tmp_path / "qstar_jax" / "runs" / "a"
    gone.write_text("")
    kept.mkdir(parents=True)
    within_seconds(20, lambda: pod("run", *words)[0].returncode == 0)  # once tmux has ended
    assert not gone.exists() and kept.exists()
    assert asked.read_text().splitlines() == installed
    assert pod("stop")[0].returncode == 0
    within_seconds(20, lambda: log.read_text().count("ended with 130") == 2)
    with (tmp_path / "qstar_jax" / "pyproject.toml").open("a") as file:
        file.write("# another requirement\n")
    host = ["ssh", "pod", "--command", "EXTRAS=tpu qstar_jax/launch/tpu_host.sh qstar dpo"]
    within_seconds(20, lambda: subprocess.run(["gcloud", *queued(*host)], env=pod.environment).returncode == 0)
    assert asked.read_text().splitlines() == installed * 2
