"""Several models, one preference: stages that sample one after the other, trained end to end (Eq. 17 and 18)."""

from qstar_jax.pipeline.arms import Meter as Meter
from qstar_jax.pipeline.arms import Point as Point
from qstar_jax.pipeline.arms import train_arm as train_arm
from qstar_jax.pipeline.language import LanguageStage as LanguageStage
from qstar_jax.pipeline.objective import PreferenceBatch as PreferenceBatch
from qstar_jax.pipeline.objective import make_arms as make_arms
from qstar_jax.pipeline.objective import pipeline_loss_fn as pipeline_loss_fn
from qstar_jax.pipeline.stage import Stage as Stage
from qstar_jax.pipeline.stage import joint_loss as joint_loss
from qstar_jax.pipeline.stage import pair_rewards as pair_rewards
from qstar_jax.pipeline.stage import sample as sample
from qstar_jax.pipeline.stage import stage_rewards as stage_rewards
from qstar_jax.pipeline.template import Template as Template
