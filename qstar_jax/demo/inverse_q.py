"""DPO as inverse soft Q-learning, in one picture: `python -m qstar_jax.demo.inverse_q advantages.png`.

A random dense reward on a small token tree; labels of whole responses; DPO. Did every single token get the advantage
that it truly has?
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from qstar_jax import mdp, tabular

TREE = tabular.TokenTree(vocabulary=4, depth=3, eos=0)
BETA = 0.5
SHOWN = {0: ("o", "tab:gray"), 8: ("^", "tab:orange"), 120: ("x", "tab:blue")}  # step -> marker and colour


def fit(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws a reward and a reference, and learns the reward back from labels of whole responses.

    Returns:
        True advantages r + V*(s') - V*(s), [S, V]; learned advantages beta log(pi / pi_ref) before each step,
        [K, S, V]; the excess of DPO's loss over its minimum, in nats, [K]; and the root mean square Bellman residual,
        in reward, [K].
    """
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed))
        rewards = jax.random.normal(keys[0], TREE.shape)
        ref_logp = jax.nn.log_softmax(jax.random.normal(keys[1], TREE.shape))
        solution = tabular.soft_value_iteration(TREE, rewards, ref_logp, beta=BETA)
        labels = tabular.preference_table(tabular.path_sums(TREE, rewards))
        fit = jax.jit(lambda *x: tabular.fit_dpo(TREE, *x, beta=BETA, steps=max(SHOWN)))(labels, ref_logp)
        learned = mdp.implicit_rewards(jax.nn.log_softmax(fit.logits), ref_logp, beta=BETA)
        lowest = tabular.population_dpo_loss(TREE, solution.log_policy, labels, ref_logp, beta=BETA)
        # The Bellman residual of the learned Q under the true reward, with the values that fit it best.
        _, residual = jax.vmap(lambda learned: tabular.best_potential(TREE, learned - rewards))(learned)
        true = mdp.implicit_rewards(solution.log_policy, ref_logp, beta=BETA)
        excess = jnp.maximum(fit.losses - lowest, 0.0)
        return tuple(np.asarray(x) for x in (true, learned, excess, jnp.sqrt((residual**2).mean((1, 2)))))


def draw(true: np.ndarray, learned: np.ndarray, excess: np.ndarray, residual: np.ndarray) -> Figure:
    """Plots learned against true advantages, and the loss and the Bellman residual over steps.

    Args:
        true: True advantages. Shape [S, V].
        learned: Learned advantages before each step. Shape [K, S, V].
        excess: Loss above its minimum, in nats. Shape [K].
        residual: Bellman residual, in reward. Shape [K].
    """
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends = [true.min(), true.max()]
    left.plot(ends, ends, color="0.8", zorder=0)
    for step, (marker, colour) in SHOWN.items():
        label = f"after {step} steps of DPO" if step else "before DPO"
        left.scatter(true, learned[step], marker=marker, color=colour, s=22, linewidths=1.2, alpha=0.8, label=label)
    left.set(xlabel="true advantage of the token (reward)", ylabel="learned: beta log(pi / pi_ref)")
    left.set_title(f"{true.size} tokens, labels of whole responses only", fontsize="medium")
    left.legend(frameon=False, fontsize="small")
    steps = np.arange(len(excess))
    right.semilogy(steps, np.maximum(residual, 1e-16), color="tab:blue", label="Bellman residual (reward)")
    right.semilogy(steps, np.maximum(excess, 1e-16), "--", color="tab:orange", label="loss above its minimum (nats)")
    right.set(xlabel="step", ylim=(1e-10, None))
    right.set_title("the Bellman residual falls with the loss", fontsize="medium")
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None):
    """Writes the picture, and prints how close the learned advantages are."""
    parser = argparse.ArgumentParser(prog="python -m qstar_jax.demo.inverse_q", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random reward and reference (default: 0)")
    arguments = parser.parse_args(argv)
    true, learned, excess, residual = fit(arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(true, learned, excess, residual).savefig(arguments.out, dpi=110)
    for step in SHOWN:
        error = np.abs(learned[step] - true).max() / np.ptp(true)
        print(f"step {step:3d}: largest error {error:.1e} of the spread, Bellman residual {residual[step]:.1e}")


if __name__ == "__main__":
    main()
