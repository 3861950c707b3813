import jax
import numpy as np

from qstar_jax.scoring import score_policy
from qstar_jax.training.objectives import sft_loss_fn, sft_objective


def test_the_loss_is_the_mean_over_tokens_and_not_over_responses(tiny_model, tiny_params, pair_batch):
    batch = pair_batch(5, responses=1)
    loss, metrics = jax.jit(sft_loss_fn(tiny_model))(tiny_params, None, batch)
    logp = np.asarray(jax.jit(lambda params: score_policy(tiny_model, params, batch).logp)(tiny_params), np.float64)
    np.testing.assert_allclose(loss, -logp.sum() / batch.response_lengths.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-6)


def test_what_the_objective_says_of_its_loss():
    objective = sft_objective()
    assert objective.kind == "completions" and objective.headline == ("loss",)
    assert not objective.uses_reference and objective.loss_at_reference is None and objective.beta is None
