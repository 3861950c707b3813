"""`qstar pipeline`."""

from contextlib import nullcontext
from pathlib import Path

from qstar_jax.config import PipelineConfig
from qstar_jax.interruption import StopSignals


def run(config: PipelineConfig):
    """Trains a pipeline of several models, samples rows of preferences from it, or splits rewards among its stages."""
    with StopSignals() if config.mode == "train" else nullcontext():  # the other modes have nothing to go on from
        import jax

        from qstar_jax.pipeline.finished import sample_pipeline, score_pipeline
        from qstar_jax.pipeline.run import train_pipeline
        from qstar_jax.report.curves import write_curves
        from qstar_jax.sharding import join_processes

        join_processes(config.mesh)
        match config.mode:
            case "sample":
                sample_pipeline(config)
            case "score":
                score_pipeline(config)
            case "train":
                train_pipeline(config)
                if jax.process_index() == 0:
                    write_curves(Path(config.out).expanduser())
