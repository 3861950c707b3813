"""The record that describes an objective: a loss, and what the rest of training must know about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from qstar_jax.data.loading import Kind
from qstar_jax.training.metrics import Metrics

# (params, ref_params, batch) -> (loss, metrics), pure. Parameters and batches are any pytrees that belong together;
# metrics["loss"] is the (sum, denominator) of the loss.
LossFn = Callable[[Any, Any, Any], tuple[Float[Array, ""], Metrics]]
# (params, ref_params, micro-batches stacked along a leading axis) -> the same with what the loss reads of them all.
PrepareFn = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Objective:
    """An objective for language models.

    Attributes:
        loss_fn: Makes the loss for a model.
        kind: What it reads from each row of a file.
        headline: Metrics that the terminal shows.
        description: The loss with its options, for messages; empty if there is nothing to choose.
        uses_reference: Whether the policy is compared with a reference.
        couples_examples: Whether the loss of an example depends on the rest of its batch, so that micro-batches would
            change it (unless they are prepared).
        loss_at_reference: Loss of a policy that equals its reference, if that is the same for all examples.
        beta: Reward per nat of log-ratio; None without a reference.
        reads_logits: Whether the loss compares whole distributions, so that log-probabilities of a reference do not
            replace it.
        guided: Whether it reads token rewards of another run.
        guide_beta: Reward per nat in them; None: that of the other run.
        by_turns: Whether turns of a response count differently.
        mismatches: Whether each example needs a second response, to the prompt of another example.
        prepare: Makes, for a model, what adds to micro-batches that which couples their examples; None if nothing can.
    """

    loss_fn: Callable[[Any], LossFn]
    kind: Kind
    headline: tuple[str, ...] = ("loss",)
    description: str = ""
    uses_reference: bool = False
    couples_examples: bool = False
    loss_at_reference: float | None = None
    beta: float | None = None
    reads_logits: bool = False
    guided: bool = False
    guide_beta: float | None = None
    by_turns: bool = False
    mismatches: bool = False
    prepare: Callable[[Any], PrepareFn] | None = None
