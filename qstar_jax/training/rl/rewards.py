"""What samples earn, token by token, and the advantages that follow from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qstar_jax import losses
from qstar_jax.config import RewardOptions, RlOptions
from qstar_jax.data.batches import Batch
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.lora import split_adapter
from qstar_jax.scoring import score_policy
from qstar_jax.training.rl.batches import padded_to

# (prompt, response) pairs -> a score each; None or NaN where there is none.
Reward = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]


@dataclass(frozen=True)
class Guide:
    """A DPO run whose token rewards are added.

    Attributes:
        model: Its policy.
        params: Parameters of the policy.
        reference: Its reference; None where the reference of this run is the same and need not run twice.
        ref_params: Parameters of the reference.
        beta: Reward per nat.
        identity: Identity of the policy's parameters.
    """

    model: CausalLM
    params: Params
    reference: CausalLM | None
    ref_params: Params | None
    beta: float
    identity: str


@dataclass(frozen=True)
class Assessor:
    """Adds to a batch of samples what they earn.

    Attributes:
        model: The policy's model.
        rl: How tokens are credited.
        reward: How scores and token rewards are weighted.
        has_reference: Whether a reference is there to stay close to.
        guide: Whose token rewards are added.
        is_exact: Whether the sampler's log pi is that of the policy (see `PolicySampler.is_exact`); otherwise the
            policy scores its samples once more.
        parts: Micro-batches along the leading axis of a batch.
    """

    model: CausalLM
    rl: RlOptions
    reward: RewardOptions
    has_reference: bool
    guide: Guide | None
    is_exact: bool
    parts: int = 1

    def compile(self) -> Callable[[Params, Params | None, Batch, Array, Array], Batch]:
        """Compiles `(params, ref_params, batch, scores, sampled_logp) -> batch`.

        Scores have shape [B, R], those of several micro-batches along the same axis; `sampled_logp` is that of
        `Samples`. The batch gets `ref_logp` and, as its `outcome`, `scores` [B, R] and of each token [B, R, T]: `logp`
        of the policy that drew it, its `rewards`, and its `advantages`.
        """
        guide_params = None if self.guide is None else (self.guide.params, self.guide.ref_params)
        assess = jax.jit(self._assess)
        return lambda *args: assess(guide_params, *args)

    def _assess(
        self, guide_params: Any, params: Params, ref_params: Params | None, batch: Batch, scores: Array, sampled: Array
    ) -> Batch:
        # Log-probabilities, one micro-batch after the other.
        sampled = padded_to(sampled, batch.index.shape[-1])
        if self.parts > 1:
            sampled, scores = (x.reshape(self.parts, -1, *x.shape[1:]) for x in (sampled, scores))
            scored = jax.lax.map(lambda x: self._score(guide_params, params, ref_params, *x), (batch, sampled))
        else:
            scored = self._score(guide_params, params, ref_params, batch, sampled)
        # Advantages, from all samples of a prompt.
        rewards, advantages = self.credit(
            scored["logp"], scored["ref_logp"], scored["guide"], scores, batch.action_mask
        )
        outcome = {"logp": scored["logp"], "scores": scores, "rewards": rewards, "advantages": advantages}
        return replace(batch, ref_logp=scored["ref_logp"], outcome=outcome)

    def _score(
        self, guide_params: Any, params: Params, ref_params: Params | None, batch: Batch, sampled: Array
    ) -> dict[str, Array | None]:
        """Log-probabilities of one micro-batch under all models."""
        mask, at = batch.action_mask, {"temperature": self.rl.temperature}
        logp = jnp.where(mask, sampled, 0.0) if self.is_exact else score_policy(self.model, params, batch, **at).logp
        ref_logp = guide = None
        if self.has_reference:
            base = split_adapter(params)[0] if ref_params is None else ref_params
            ref_logp = score_policy(self.model.base, base, batch, **at).logp
        if self.guide is not None:
            guide = score_policy(self.guide.model, guide_params[0], batch).logp
            shared = self.guide.reference is None
            guide -= ref_logp if shared else score_policy(self.guide.reference, guide_params[1], batch).logp
            guide *= self.guide.beta
        return {"logp": logp, "ref_logp": ref_logp, "guide": guide}

    def credit(
        self,
        logp: Float[Array, "*B R T"],
        ref_logp: Float[Array, "*B R T"] | None,
        guide: Float[Array, "*B R T"] | None,
        scores: Float[Array, "*B R"],
        mask: Bool[Array, "*B R T"],
    ) -> tuple[Float[Array, "*B R T"], Float[Array, "*B R T"]]:
        """Credits the tokens of some prompts' samples with what they earn.

        Returns:
            Their rewards, without the price of leaving the reference, and their advantages, with it.
        """
        rewards = losses.rto_rewards(
            jnp.zeros_like(logp) if guide is None else guide,
            scores,
            mask,
            token_weight=self.reward.guide_weight,
            token_clip=self.reward.guide_clip,
            sequence_weight=1.0 if self.reward.weight is None else self.reward.weight,
        )
        net = rewards if ref_logp is None else rewards - self.rl.kl_coef * losses.kl_penalty(logp, ref_logp, mask)
        if scores.shape[-1] == 1:  # an evaluation: there is nothing to compare with
            advantages = jnp.zeros_like(net)
        elif self.rl.credit == "token":
            advantages = losses.token_advantages(net, mask)
        else:
            advantages = jnp.where(mask, losses.leave_one_out(net.sum(-1))[..., None], 0.0)
        if self.rl.normalize_advantages:
            count = jnp.maximum(mask.sum(), 1)
            deviations = jnp.where(mask, advantages - advantages.sum() / count, 0.0)
            advantages /= jnp.sqrt((deviations**2).sum() / count) + 1e-8
        return rewards, advantages
