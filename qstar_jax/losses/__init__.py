"""Losses on per-token log-probabilities.

Every loss is a pure function of one form: it takes arrays of token log-ratios (or log-probabilities) and a mask, then
hyperparameters by keyword, and returns the unreduced loss of each example and a `LossMetrics`. Responses lie along one
axis: [..., 2, T], chosen first, or [..., R, T], best first. `make_loss` finds losses by name and binds their options;
what it returns reads a `TokenScores`.
"""

from qstar_jax.losses.catalog import LOSSES as LOSSES
from qstar_jax.losses.catalog import reads_single as reads_single
from qstar_jax.losses.divergences import DIVERGENCES as DIVERGENCES
from qstar_jax.losses.divergences import alpha_divergence as alpha_divergence
from qstar_jax.losses.divergences import forward_kl as forward_kl
from qstar_jax.losses.divergences import js_divergence as js_divergence
from qstar_jax.losses.divergences import reverse_kl as reverse_kl
from qstar_jax.losses.pairwise import discopop as discopop
from qstar_jax.losses.pairwise import dpo_shift as dpo_shift
from qstar_jax.losses.pairwise import dpop as dpop
from qstar_jax.losses.pairwise import exo_pair as exo_pair
from qstar_jax.losses.pairwise import hinge as hinge
from qstar_jax.losses.pairwise import ipo as ipo
from qstar_jax.losses.pairwise import ipo_sum as ipo_sum
from qstar_jax.losses.pairwise import robust as robust
from qstar_jax.losses.pairwise import sigmoid as sigmoid
from qstar_jax.losses.pairwise import sigmoid_norm as sigmoid_norm
from qstar_jax.losses.pointwise import a_star as a_star
from qstar_jax.losses.pointwise import apo_down as apo_down
from qstar_jax.losses.pointwise import apo_zero as apo_zero
from qstar_jax.losses.pointwise import bco_pair as bco_pair
from qstar_jax.losses.pointwise import implicit_prm as implicit_prm
from qstar_jax.losses.pointwise import kto as kto
from qstar_jax.losses.pointwise import kto_baseline as kto_baseline
from qstar_jax.losses.pointwise import nca_pair as nca_pair
from qstar_jax.losses.pointwise import qrpo as qrpo
from qstar_jax.losses.pointwise import sppo_hard as sppo_hard
from qstar_jax.losses.policy_gradient import clipped_surrogate as clipped_surrogate
from qstar_jax.losses.policy_gradient import kl_penalty as kl_penalty
from qstar_jax.losses.policy_gradient import leave_one_out as leave_one_out
from qstar_jax.losses.policy_gradient import reinforce as reinforce
from qstar_jax.losses.policy_gradient import returns_to_go as returns_to_go
from qstar_jax.losses.policy_gradient import rto_rewards as rto_rewards
from qstar_jax.losses.policy_gradient import token_advantages as token_advantages
from qstar_jax.losses.preference_loss import PreferenceLoss as PreferenceLoss
from qstar_jax.losses.rankings import plackett_luce as plackett_luce
from qstar_jax.losses.reference_free import cpo as cpo
from qstar_jax.losses.reference_free import negative_log_likelihood as negative_log_likelihood
from qstar_jax.losses.reference_free import orpo as orpo
from qstar_jax.losses.reference_free import sft as sft
from qstar_jax.losses.reference_free import simpo as simpo
from qstar_jax.losses.registry import make_loss as make_loss
from qstar_jax.losses.responses import LossMetrics as LossMetrics
from qstar_jax.losses.segments import cpl as cpl
from qstar_jax.losses.segments import cpl_all_pairs as cpl_all_pairs
from qstar_jax.losses.token_level import dmpo as dmpo
from qstar_jax.losses.token_level import tdpo1 as tdpo1
from qstar_jax.losses.token_level import tdpo2 as tdpo2
from qstar_jax.losses.token_level import tgdpo as tgdpo
from qstar_jax.losses.token_level import weighted_sigmoid as weighted_sigmoid
from qstar_jax.losses.token_weights import TOKEN_WEIGHTS as TOKEN_WEIGHTS
from qstar_jax.losses.transport import aot as aot
from qstar_jax.losses.transport import aot_unpaired as aot_unpaired
from qstar_jax.losses.weighting import desensitize_length as desensitize_length
from qstar_jax.losses.weighting import wpo_weights as wpo_weights
