"""Who decides which of two responses to a prompt is better: a reward, a reward model or a language model."""

from qstar_jax.evaluation.judges.base import Comparison as Comparison
from qstar_jax.evaluation.judges.base import Judge as Judge
from qstar_jax.evaluation.judges.base import Verdict as Verdict
from qstar_jax.evaluation.judges.base import WinRate as WinRate
from qstar_jax.evaluation.judges.base import win_rate as win_rate
from qstar_jax.evaluation.judges.llm import LlmJudge as LlmJudge
from qstar_jax.evaluation.judges.make import make_judge as make_judge
from qstar_jax.evaluation.judges.options import check_judge as check_judge
from qstar_jax.evaluation.judges.rewards import RewardJudge as RewardJudge
