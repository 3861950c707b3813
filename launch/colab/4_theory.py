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
# # The theory, on MDPs small enough to enumerate
#
# DPO in the token MDP is inverse soft Q-learning. On a tree of all responses everything can be computed: the optimal
# policy by dynamic programming, labels of whole responses by Bradley-Terry, and DPO until it converges.

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
SEED = 0
BETA = 0.5
DEPTH = 3
VOCABULARY = 4

# %%
import jax
import jax.numpy as jnp
import numpy as np

from qstar_jax import mdp, tabular

jax.config.update("jax_enable_x64", True)
tree = tabular.TokenTree(vocabulary=VOCABULARY, depth=DEPTH, eos=0)
keys = jax.random.split(jax.random.key(SEED))
rewards = jax.random.normal(keys[0], tree.shape)
ref_logp = jax.nn.log_softmax(jax.random.normal(keys[1], tree.shape))
tree.shape

# %% [markdown]
# ## 1. Soft-optimal values
#
# Backward over the tree, the policy `pi = pi_ref exp((Q - V) / beta)`: its implicit rewards are the advantages `r +
# V(s') - V(s)` (Eq. 10).

# %%
solution = tabular.soft_value_iteration(tree, rewards, ref_logp, beta=BETA)
advantages = mdp.implicit_rewards(solution.log_policy, ref_logp, beta=BETA)
lowest, highest = float(advantages.min()), float(advantages.max())
print(f"{advantages.size} advantages of single tokens, from {lowest:.2f} to {highest:.2f}")

# %% [markdown]
# ## 2. Inverse Q-learning
#
# DPO sees only which of two whole responses is preferred. Yet it gives every single token the advantage that it truly
# has.

# %%
labels = tabular.preference_table(tabular.path_sums(tree, rewards))
fit = jax.jit(lambda *x: tabular.fit_dpo(tree, *x, beta=BETA, steps=120))(labels, ref_logp)
learned = mdp.implicit_rewards(jax.nn.log_softmax(fit.logits), ref_logp, beta=BETA)
for step in (0, 1, 2, 4, 8, 16, 120):
    error = float(jnp.abs(learned[step] - advantages).max())
    print(f"step {step:3}: loss {float(fit.losses[step]):.6f}, largest error of an advantage {error:.1e}")

# %%
from IPython.display import Image
from qstar_jax.demo.inverse_q import draw
from qstar_jax.demo.inverse_q import fit as fit_tree

draw(*fit_tree(SEED)).savefig("advantages.png", dpi=110)
Image("advantages.png")

# %% [markdown]
# ## 3. The reward up to a potential
#
# The learned rewards differ from the true ones by `V(s') - V(s)`: shaping by a potential, which changes no preference
# and no optimal policy (Theorem 1).

# %%
potential, rest = tabular.best_potential(tree, learned[120] - rewards)
print(f"largest part of the difference that is no potential: {float(jnp.abs(rest).max()):.1e}")

# %% [markdown]
# ## 4. Why implicit rewards fall
#
# The expected implicit reward of the reference's own responses is `-beta KL(pi_ref || pi)` (Eq. 16): 0 before
# training, and negative as soon as the policy moves. If the chosen responses come from the reference, their rewards
# must fall with it.


# %%
ref_logps = np.asarray(tabular.path_sums(tree, ref_logp))
both = np.exp(ref_logps)[:, None] * np.exp(ref_logps) * np.asarray(labels)  # chosen, rejected
chosen = both.sum(1) / both.sum()  # how often each response is the chosen of two
for step in (0, 1, 2, 4, 8, 120):
    logps = np.asarray(tabular.path_sums(tree, jax.nn.log_softmax(fit.logits[step])))
    returns = BETA * (logps - ref_logps)
    own = np.exp(ref_logps) @ returns
    print(f"step {step:3}: the reference's own responses {own:+.4f}, the chosen of two {chosen @ returns:+.4f}")
