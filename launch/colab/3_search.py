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
# # Search: likelihood is reward
#
# For a DPO policy, searching for the response of highest reward and searching for the most likely one are the same
# (Section 4.2 and Eq. 12 and 13 of the paper). So beam search improves the policy, and no reward model is needed;
# until wide beams over-optimize.

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
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = ["What is the capital of France?", "Name three colors."]
AS_CHAT = True
MAX_NEW_TOKENS = 24
WIDTHS = [1, 2, 5, 10]
MDPS = 20

# %%
import qstar_jax as qstar

model = qstar.load(MODEL)

# %% [markdown]
# ## Beams
#
# Scores are sums of log pi, without a length penalty. "Proven best" is a certificate: everything that the search
# pruned had a lower score already, and scores can only fall.

# %%
model.generate(PROMPTS, beams=5, return_sequences=3, max_new_tokens=MAX_NEW_TOKENS, as_chat=AS_CHAT)

# %% [markdown]
# ## Wider beams
#
# The most likely response gets likelier with the width, and often shorter: that is how wide beams over-optimize.

# %%
for width in WIDTHS:
    answers = model.generate(PROMPTS, beams=width, max_new_tokens=MAX_NEW_TOKENS, as_chat=AS_CHAT)
    logp = sum(best.logp for best, *_ in answers) / len(answers)
    length = sum(best.length for best, *_ in answers) / len(answers)
    proven = sum(bool(best.certified) for best, *_ in answers)
    print(f"{width:3} beams: log pi {logp:7.2f}, {length:5.1f} tokens, {proven} of {len(answers)} proven best")

# %% [markdown]
# ## The best of all responses, with proof
#
# `exact` expands prefixes, best first, until nothing can be better: for short responses.

# %%
shortest = {"max_new_tokens": 6, "as_chat": AS_CHAT}
exact = model.generate(PROMPTS[0], method="exact", max_expansions=3000, **shortest)
beam = model.generate(PROMPTS[0], beams=20, **shortest)
for name, [[best]] in (("exact", exact), ("20 beams", beam)):
    print(f"{name:9} log pi {best.logp:.4f} {best.text!r} (certified: {best.certified})")

# %% [markdown]
# ## Tree search by reward equals search by likelihood
#
# On a token MDP whose optimal policy is known, a tree search that maximizes the true reward plus `beta log pi_ref`,
# with values V* at its leaves, visits the same nodes as one that maximizes `beta log pi` and knows no reward at all.

# %%
from qstar_jax.demo.equivalence import main as compare_searches

compare_searches(mdps=MDPS)
