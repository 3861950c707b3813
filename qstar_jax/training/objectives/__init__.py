"""What a run minimizes. An objective is a record (`base.Objective`) that `plan.make_plan` chooses once."""

from qstar_jax.training.objectives.base import LossFn as LossFn
from qstar_jax.training.objectives.base import Objective as Objective
from qstar_jax.training.objectives.policy_gradient import policy_gradient_loss_fn as policy_gradient_loss_fn
from qstar_jax.training.objectives.policy_gradient import policy_gradient_objective as policy_gradient_objective
from qstar_jax.training.objectives.preference import Weigh as Weigh
from qstar_jax.training.objectives.preference import preference_loss_fn as preference_loss_fn
from qstar_jax.training.objectives.preference import preference_objective as preference_objective
from qstar_jax.training.objectives.sft import sft_loss_fn as sft_loss_fn
from qstar_jax.training.objectives.sft import sft_objective as sft_objective
from qstar_jax.training.objectives.single import single_loss_fn as single_loss_fn
from qstar_jax.training.objectives.single import single_objective as single_objective
