"""The first loss of a policy that starts as its own reference is known; any other reveals a mistake."""

from collections.abc import Mapping

TOLERANCE = 1e-3  # relative if the loss is above 1: two compilations of one forward pass differ by less


def check_first_loss(metrics: Mapping[str, float], expected: float):
    """Refuses a run whose first loss is not that of a policy which equals its reference (ln 2 for DPO).

    Raises:
        RuntimeError: If the loss is further than `TOLERANCE` from it.
    """
    if abs(metrics["loss"] - expected) > TOLERANCE * max(expected, 1.0):
        rewards = [f"{name} {metrics[name]:.6f}" for name in ("rewards/chosen", "rewards/rejected") if name in metrics]
        raise RuntimeError(
            f"the loss at step 0 is {metrics['loss']:.6f}; expected {expected:.6f}, because the policy "
            f"starts as its own reference and every reward is then 0 (found: {', '.join(rewards)}). Policy and "
            "reference differ in their parameters, in their number type or in randomness such as dropout"
        )
