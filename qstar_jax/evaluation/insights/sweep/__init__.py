"""Insight 2, search: responses against the width of the beam that found them.

The paper samples for width 1 and has no greedy control; here both are measured, so that the gain of search is told
apart from the gain of less randomness.
"""

from qstar_jax.evaluation.insights.sweep.measure import measure_sweep as measure_sweep
from qstar_jax.evaluation.insights.sweep.outcomes import Outcome as Outcome
from qstar_jax.evaluation.insights.sweep.outcomes import sweep_run as sweep_run
from qstar_jax.evaluation.insights.sweep.record import Point as Point
from qstar_jax.evaluation.insights.sweep.record import Sweep as Sweep
from qstar_jax.evaluation.insights.sweep.record import SweepRun as SweepRun
from qstar_jax.evaluation.insights.sweep.settings import Setting as Setting
from qstar_jax.evaluation.insights.sweep.settings import settings as settings
