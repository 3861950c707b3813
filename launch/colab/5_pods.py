# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From one chip to a pod
#
# `qstar plan` says what a run needs on hardware that you do not have: memory, arithmetic, traffic and seconds per
# step. The same command then runs on one chip, on a host of eight, or on many hosts.

# %% [markdown]
# The first cell installs the library. Colab has an older JAX, which pip replaces together with its plugin for GPUs;
# so the cell restarts the runtime once, and Colab says that it crashed. Then run all cells.

# %% tags=["install"]
import importlib.util
import os
import subprocess
import sys

SOURCE = "qstar_jax"  # a release, or "git+https://..." of a repository, or the folder of a clone
if getattr(importlib.util.find_spec("qstar_jax"), "origin", None) is None:  # a folder of that name has no origin
    plugins = {"jax_cuda12_plugin": "[cuda12]", "jax_cuda13_plugin": "[cuda13]", "libtpu": "[tpu]"}
    extra = next((extra for plugin, extra in plugins.items() if importlib.util.find_spec(plugin)), "")
    wanted = f"qstar_jax{extra} @ {SOURCE}" if "://" in SOURCE else f"{SOURCE}{extra}"
    print(f"installing {wanted}")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--upgrade", wanted], check=True)
    os.kill(os.getpid(), 9)

# %% tags=["parameters"]
MODEL = "EleutherAI/pythia-2.8b"
TOPOLOGY = "a100-80gb:1x1x8"
BATCH_SIZE = 64

# %% [markdown]
# ## Plan
#
# TPUs (`v5e:4x4`, `v5p:2x2x2`, ...) and H100s are compiled for, which takes the extras `plan` and `plan-gpu`; other
# GPUs are estimated, and the plan says so. Where a run does not fit, settings that need less memory are tried.

# %%
from qstar_jax.cli.main import main as qstar

words = ["plan", "--model", MODEL, "--topology", TOPOLOGY, "--out", "runs/plan"]
words += ["--train.batch_size", str(BATCH_SIZE), "--compute.dtype", "bfloat16"]
words += ["--data.max_length", "512", "--data.max_prompt_length", "256"]
assert qstar(words) == 0

# %%
import json
from pathlib import Path

plan = json.loads(Path("runs/plan/plan.json").read_text())
plan

# %% [markdown]
# ## Launch
#
# On a pod, the same command runs on every host; `launch/tpu_pod.sh` does that for TPUs, `launch/slurm.sbatch` for
# GPUs under Slurm, and `launch/processes.sh` starts several processes on one machine to try it. The mesh has three
# axes: `data` and `fsdp` share the batch, `fsdp` also the parameters, `tensor` shares matrices.

# %%
print(
    f"qstar dpo --model {MODEL} --data.train pairs.jsonl --out runs/dpo "
    f"--train.batch_size {BATCH_SIZE} --compute.dtype bfloat16"
)
