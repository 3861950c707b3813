"""Every option of every verb, as frozen dataclasses: what a YAML file or a dotted flag may set.

Nothing is imported here that takes time, so `qstar --help` stays quick. Lengths are in tokens.
"""

from qstar_jax.config.compute import ComputeOptions as ComputeOptions
from qstar_jax.config.compute import Dtype as Dtype
from qstar_jax.config.compute import MeshOptions as MeshOptions
from qstar_jax.config.control import ActorOptions as ActorOptions
from qstar_jax.config.control import ControlConfig as ControlConfig
from qstar_jax.config.data import DataOptions as DataOptions
from qstar_jax.config.decode import DecodeOptions as DecodeOptions
from qstar_jax.config.decode import Method as Method
from qstar_jax.config.insights import DeclineConfig as DeclineConfig
from qstar_jax.config.insights import DemoConfig as DemoConfig
from qstar_jax.config.insights import ReportConfig as ReportConfig
from qstar_jax.config.insights import SweepConfig as SweepConfig
from qstar_jax.config.judge import JudgeOptions as JudgeOptions
from qstar_jax.config.loss import LossOptions as LossOptions
from qstar_jax.config.loss import ReferenceOptions as ReferenceOptions
from qstar_jax.config.loss import WeightingOptions as WeightingOptions
from qstar_jax.config.optimizer import OptimizerOptions as OptimizerOptions
from qstar_jax.config.pairs import PairsConfig as PairsConfig
from qstar_jax.config.pipeline import PipelineConfig as PipelineConfig
from qstar_jax.config.pipeline import StageOptions as StageOptions
from qstar_jax.config.plan import PlanConfig as PlanConfig
from qstar_jax.config.rl import RewardOptions as RewardOptions
from qstar_jax.config.rl import RlConfig as RlConfig
from qstar_jax.config.rl import RlOptions as RlOptions
from qstar_jax.config.selection import SelectConfig as SelectConfig
from qstar_jax.config.train import DpoConfig as DpoConfig
from qstar_jax.config.train import LogOptions as LogOptions
from qstar_jax.config.train import LoraOptions as LoraOptions
from qstar_jax.config.train import SftConfig as SftConfig
from qstar_jax.config.train import TrainOptions as TrainOptions
from qstar_jax.config.verbs import ChatConfig as ChatConfig
from qstar_jax.config.verbs import DataConfig as DataConfig
from qstar_jax.config.verbs import EnvConfig as EnvConfig
from qstar_jax.config.verbs import ExportConfig as ExportConfig
from qstar_jax.config.verbs import GenerateConfig as GenerateConfig
from qstar_jax.config.verbs import GuidancePair as GuidancePair
from qstar_jax.config.verbs import PlayConfig as PlayConfig
from qstar_jax.config.verbs import ScoreConfig as ScoreConfig
from qstar_jax.config.verbs import ViewConfig as ViewConfig

# Blocks of which one option selects a variant that reads some of the others.
VARIANT_BLOCKS = {
    "decode": DecodeOptions,
    "judge": JudgeOptions,
    "optimizer": OptimizerOptions,
    "reward": RewardOptions,
    "rl": RlOptions,
    "weighting": WeightingOptions,
}
