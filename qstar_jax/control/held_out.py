"""How a policy's log-probabilities of held-out segments moved since preference learning began, beside the theory.

After behaviour cloning the data are like the clone's own actions, so with pi_0 the policy at the switch

    E[beta sum_t gamma^t (log pi - log pi_0)] = -beta E[sum_t gamma^t KL(pi_0 || pi)]        (Eq. 16)

over all segments, whatever is learned. The right side is exact at the states of the segments, as policies are Gaussian.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qstar_jax import losses
from qstar_jax.control.actor import Actor, Params
from qstar_jax.control.learning import SegmentArrays


def held_out_metrics(
    actor: Actor,
    start: Params,
    segments: SegmentArrays,
    pairs: Int[np.ndarray, "N 2"],
    *,
    beta: float,
    bias: float,
    discount: float,
) -> Callable[[Params], dict[str, float]]:
    """Makes `params -> metrics`, without dropout, with the names of preference training on text.

    Args:
        actor: The policy.
        start: pi_0, its parameters at the switch, where rewards are 0.
        segments: Held-out segments; `ref_logp` is what the loss subtracts.
        pairs: Disjoint pairs of them, the chosen one first. Shape [N, 2].
        beta: alpha, reward per nat.
        bias: See `losses.cpl`.
        discount: See `losses.cpl`.

    Returns:
        A function of the parameters. `eval_logps/*` are sums of log pi, `eval_rewards/*` beta times the discounted
        log-ratio to pi_0, with standard errors; `eval_rewards/reference_expected` is the theory, and `eval_accuracies`
        the share of pairs that the loss ranks right.
    """
    discounts = discount ** jnp.arange(segments.actions.shape[1])

    @jax.jit
    def measure(params: Params) -> tuple[Float[Array, ""], Float[Array, "N 2"], dict[str, Float[Array, "..."]]]:
        logp, start_logp = (actor.log_prob(p, segments.observations, segments.actions) for p in (params, start))
        relative = (logp - segments.ref_logp)[pairs]
        options = {"beta": beta, "bias": bias, "discount": discount}
        loss, metrics = losses.cpl(relative, jnp.ones(relative.shape, bool), **options)
        sums = {
            "logps": logp.sum(-1)[pairs],
            "rewards": beta * ((logp - start_logp) @ discounts)[pairs],
            "expected": -beta * actor.kl(start, params, segments.observations) @ discounts,
        }
        return loss.mean(), metrics.accuracies.mean(), sums

    def metrics(params: Params) -> dict[str, float]:
        loss, accuracy, sums = jax.device_get(measure(params))
        chosen, rejected = sums["rewards"].T
        measured = {
            "chosen": chosen,
            "rejected": rejected,
            "margins": chosen - rejected,
            "pairs": (chosen + rejected) / 2,
            "reference_expected": sums["expected"],
        }
        found = {"eval_loss": float(loss), "eval_accuracies": float(accuracy)}
        found |= {
            f"eval_logps/{name}": float(sums["logps"][:, n].mean()) for n, name in enumerate(("chosen", "rejected"))
        }
        for name, values in measured.items():
            found[f"eval_rewards/{name}"] = float(values.mean())
            found[f"eval_rewards/{name}_stderr"] = float(values.std(ddof=1) / len(values) ** 0.5)
        return found | {"eval_lengths/chosen": float(segments.actions.shape[1])}

    return metrics
