"""Behaviour cloning and contrastive preference learning of an actor: losses of drawn batches, and their minimization.

An objective is a function `(params, key) -> loss` that draws its own batch, so a whole stretch of steps is one scan.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qstar_jax import losses
from qstar_jax.control.actor import Actor, Params

Objective = Callable[[Params, PRNGKeyArray], Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SegmentArrays:
    """Segments on the device; see `segments.Segments`.

    Attributes:
        observations: Shape [B, L, O].
        actions: Shape [B, L, A].
        scores: Shape [B].
        ref_logp: log pi_ref of each action, in nats, which CPL-KL subtracts; 0 for CPL. Shape [B, L].
    """

    observations: Float[Array, "B L O"]
    actions: Float[Array, "B L A"]
    scores: Float[Array, " B"]
    ref_logp: Float[Array, "B L"]


def clone(actor: Actor, segments: SegmentArrays, *, batch_size: int) -> Objective:
    """Makes the objective of behaviour cloning: the mean of -log pi(a | s) over the steps of drawn segments."""

    def loss(params: Params, key: PRNGKeyArray) -> Float[Array, ""]:
        draw, drop = jax.random.split(key)
        batch = jax.random.randint(draw, (batch_size,), 0, len(segments.scores))
        return -actor.log_prob(params, segments.observations[batch], segments.actions[batch], drop).mean()

    return loss


def prefer_pairs(
    actor: Actor,
    segments: SegmentArrays,
    pairs: Int[Array, "N 2"],
    *,
    batch_size: int,
    beta: float,
    bias: float,
    discount: float,
) -> Objective:
    """Makes the objective of CPL on given pairs of segments, the chosen one first; options as in `losses.cpl`."""

    def loss(params: Params, key: PRNGKeyArray) -> Float[Array, ""]:
        draw, drop = jax.random.split(key)
        batch = pairs[jax.random.randint(draw, (batch_size,), 0, len(pairs))]
        logp = _log_ratios(actor, params, segments, batch, drop)
        mask = jnp.ones(logp.shape, bool)
        return losses.cpl(logp, mask, beta=beta, bias=bias, discount=discount)[0].mean()

    return loss


def prefer_all_pairs(
    actor: Actor, segments: SegmentArrays, *, batch_size: int, beta: float, bias: float, discount: float
) -> Objective:
    """Makes the objective of CPL on all pairs of a batch of segments; options as in `losses.cpl_all_pairs`."""

    def loss(params: Params, key: PRNGKeyArray) -> Float[Array, ""]:
        draw, drop = jax.random.split(key)
        batch = jax.random.choice(draw, len(segments.scores), (batch_size,), replace=False)
        logp = _log_ratios(actor, params, segments, batch, drop)
        mask, scores = jnp.ones(logp.shape, bool), segments.scores[batch]
        return losses.cpl_all_pairs(logp, mask, scores, beta=beta, bias=bias, discount=discount)[0].mean()

    return loss


def minimizer(
    objective: Objective, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[Params, optax.OptState, int, int], tuple[Params, optax.OptState, Float[Array, " N"]]]:
    """Makes `(params, state, first, steps) -> (params, state, losses)`, one compiled scan for each number of steps.

    Args:
        objective: What is minimized.
        optimizer: How; its state begins as `optimizer.init(params)`.
        seed: Seed of the batches and the dropout; those of a step are a function of it and of the step's number.
    """

    def advance(carry: tuple[Params, optax.OptState], step: Int[Array, ""]):
        params, state = carry
        key = jax.random.fold_in(jax.random.key(seed), step)
        loss, gradients = jax.value_and_grad(objective)(params, key)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit(static_argnums=3)
    def run(params: Params, state: optax.OptState, first: int, steps: int):
        (params, state), history = jax.lax.scan(advance, (params, state), first + jnp.arange(steps))
        return params, state, history

    return run


def _log_ratios(
    actor: Actor, params: Params, segments: SegmentArrays, batch: Int[Array, "*B"], key: PRNGKeyArray
) -> Float[Array, "*B L"]:
    logp = actor.log_prob(params, segments.observations[batch], segments.actions[batch], key)
    return logp - segments.ref_logp[batch]
