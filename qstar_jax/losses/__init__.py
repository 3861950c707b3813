"""Losses on per-token log-probabilities: arrays and masks in, an unreduced loss for each row out."""

from qstar_jax.losses.preference import dpo as dpo
from qstar_jax.losses.supervised import negative_log_likelihood as negative_log_likelihood
