"""Several models, one preference: stages that sample one after the other, trained end to end (Eq. 17 and 18)."""

from qstar_jax.pipeline.stage import Stage as Stage
from qstar_jax.pipeline.stage import joint_loss as joint_loss
from qstar_jax.pipeline.stage import sample as sample
from qstar_jax.pipeline.stage import stage_rewards as stage_rewards
