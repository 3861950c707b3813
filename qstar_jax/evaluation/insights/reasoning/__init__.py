"""Reasoning: do labels of outcomes alone tell which step of a solution is false?

The paper's discussion supposes so, and runs nothing: summed over a prefix, Eq. 10 makes the log-ratio of a trained
policy the value of the prefix. In tiny-sums every step, and the exact value of every prefix, is known.
"""

from qstar_jax.evaluation.insights.reasoning.choices import SIZES as SIZES
from qstar_jax.evaluation.insights.reasoning.choices import Sampled as Sampled
from qstar_jax.evaluation.insights.reasoning.false_steps import HeldOut as HeldOut
from qstar_jax.evaluation.insights.reasoning.measure import measure_reasoning as measure_reasoning
from qstar_jax.evaluation.insights.reasoning.record import AUC as AUC
from qstar_jax.evaluation.insights.reasoning.record import CEILING as CEILING
from qstar_jax.evaluation.insights.reasoning.record import DPO as DPO
from qstar_jax.evaluation.insights.reasoning.record import ENTROPY as ENTROPY
from qstar_jax.evaluation.insights.reasoning.record import F1 as F1
from qstar_jax.evaluation.insights.reasoning.record import OUTCOME as OUTCOME
from qstar_jax.evaluation.insights.reasoning.record import PRM as PRM
from qstar_jax.evaluation.insights.reasoning.record import RANDOM as RANDOM
from qstar_jax.evaluation.insights.reasoning.record import REFERENCE as REFERENCE
from qstar_jax.evaluation.insights.reasoning.record import Reasoning as Reasoning
from qstar_jax.evaluation.insights.reasoning.record import Searched as Searched
from qstar_jax.evaluation.insights.reasoning.record import StepScore as StepScore
from qstar_jax.evaluation.insights.reasoning.record import best as best
from qstar_jax.evaluation.insights.reasoning.record import vote as vote
