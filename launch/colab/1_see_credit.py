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
# # See where a model thinks an answer went wrong
#
# A language model that was trained on preferences (DPO) carries a reward for every single token: `beta * (log pi -
# log pi_ref)`, its log-probability against that of the model from which its training began (["From r to
# Q*"](https://arxiv.org/abs/2404.12358), Eq. 11). Nothing is trained here: load the two models, score an answer, look
# at it.

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

# %% [markdown]
# ## A policy and its reference
#
# Any DPO model and the model before DPO, in Hugging Face folders or on the hub. A run of `qstar dpo` knows its
# reference, and needs neither `REFERENCE` nor `BETA`.

# %% tags=["parameters"]
MODEL = "allenai/OLMo-2-0425-1B-DPO"
REFERENCE = "allenai/OLMo-2-0425-1B-SFT"
BETA = 0.1
DTYPE = "bfloat16"
PROMPT = "What is the capital of France, and what is it known for?"
RIGHT = "The capital of France is Paris, known for the Eiffel Tower."
WRONG = "The capital of France is Lyon, known for the Colosseum."
AS_CHAT = True

# %%
import qstar_jax as qstar

model = qstar.load(MODEL, reference=REFERENCE, beta=BETA, dtype=DTYPE)

# %% [markdown]
# ## The heatmap
#
# Blue tokens are those that training made more likely, red ones those that it made less likely. Point at a token for
# its numbers: log pi, log pi_ref, reward, Q and V, and what the model would rather have said.

# %%
scores = model.score(PROMPT, RIGHT, WRONG, as_chat=AS_CHAT)
scores

# %% [markdown]
# The same numbers in Python. The reward of an answer is the sum over its tokens; what DPO compares is the difference
# of two such sums.

# %%
for name, answer in zip(("right", "wrong"), scores, strict=True):
    lowest = min(range(len(answer.pieces)), key=lambda t: answer.reward[t])
    print(f"{name}: total reward {answer.total_reward:+.3f}, lowest token {answer.pieces[lowest]!r}")

# %% [markdown]
# ## Logits are Q-values
#
# `q` is beta times the logit of a token, `v` beta times the log-sum-exp of all logits: so `q - v` is beta times log
# pi (Eq. 5 to 7).

# %%
answer = scores[0]
for piece, q, v, logp in zip(answer.pieces, answer.q, answer.v, answer.logp, strict=True):
    print(f"{piece!r:16} Q {q:8.3f}  V {v:8.3f}  Q - V {q - v:8.3f}  beta log pi {answer.beta * logp:8.3f}")
