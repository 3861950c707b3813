"""What DPO learns from exact labels in the tabular world, down to rounding errors."""

from functools import partial

import jax
import jax.numpy as jnp

from qstar_jax import tabular


@partial(jax.jit, static_argnums=0)
def fit_exactly(tree, labels, ref_logp, beta):
    """Rewards beta * log-ratio that DPO learns: L-BFGS, then Newton's method; in float64. Shape [S, V]."""

    def loss_fn(logits):
        return tabular.population_dpo_loss(tree, logits.reshape(tree.shape), labels, ref_logp, beta=beta)

    def newton(_, logits):
        return logits - jnp.linalg.pinv(jax.hessian(loss_fn)(logits), rtol=1e-9) @ jax.grad(loss_fn)(logits)

    start = tabular.fit_dpo(tree, labels, ref_logp, beta=beta, steps=100).logits[-1]
    logits = jax.lax.fori_loop(0, 5, newton, start.reshape(-1))
    return beta * (jax.nn.log_softmax(logits.reshape(tree.shape)) - ref_logp)
