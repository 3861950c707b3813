"""This library as a worker of dpo_vs_trl.py: the same requests on stdin as dpo_peers.py, the same lines of JSON out.

python tests/benchmarks/dpo_ours.py --model FOLDER --pairs '[FILE.npz]' [--batch 4] [--reference live]

Programs are compiled before anything is allocated; weights are read, or drawn where there are none, at each `begin`.
"""

import itertools
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jsonargparse import auto_cli
from worker import Turns, answering, process_peak_bytes

from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions, OptimizerOptions
from qstar_jax.data.batches import Batch, step_indices
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.packing import Layout
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.losses import make_loss
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.decoder_config import DecoderConfig
from qstar_jax.scoring import score_policy
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.checkpoints import abstract_with_shardings
from qstar_jax.store.open import load_model, param_shardings
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.step import TrainState, make_train_step
from qstar_jax.training.throughput import measured_matmul_peak, peak_flops


def read_pairs(path: str) -> list[Example]:
    """Reads the pairs' tokens that dpo_vs_trl.py has written."""
    with np.load(path, allow_pickle=False) as file:
        prompts = np.split(file["prompts"], np.cumsum(file["prompt_lengths"])[:-1])
        lengths = file["answer_lengths"]
        answers = np.split(file["answers"], np.cumsum(lengths.ravel())[:-1])
    return [
        Example(prompt, False, (Response(answers[2 * i], False), Response(answers[2 * i + 1], False)), i)
        for i, prompt in enumerate(prompts)
    ]


def open_model(path: str, compute: ComputeOptions, mesh: Mesh) -> tuple[CausalLM, Callable[[], Params]]:
    """Reads the model's shape; its weights are loaded by what is returned with it, or drawn if there are none."""
    source = Path(path)
    config = source if source.is_file() else source / "config.json"
    model = CausalLM.from_hf(json.loads(config.read_text(encoding="utf-8")), compute)
    if source.is_dir() and any(source.glob("*.safetensors")):
        return model, lambda: load_model(path, compute, mesh, MeshOptions()).params
    shardings = param_shardings(model, mesh, MeshOptions())
    return model, lambda: jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))


def model_flops(config: DecoderConfig, examples: list[Example], shared: bool) -> float:
    """Counts the FLOPs of one forward pass over pairs whose prompts are computed once, or once for each response."""
    prompts = np.array([len(e.prompt) for e in examples])[:, None]
    answers = np.array([[len(r.ids) for r in e.responses] for e in examples])
    if shared:
        tokens, keys = prompts.sum() + answers.sum(), (prompts**2 / 2).sum() + (answers * (prompts + answers / 2)).sum()
    else:
        tokens, keys = (prompts + answers).sum(), ((prompts + answers) ** 2 / 2).sum()
    return config.forward_flops(tokens=tokens, scored_tokens=answers.sum(), context=keys / tokens)


@dataclass(frozen=True)
class Trainer:
    """DPO with AdamW: a step, the state in which it begins, and the FLOPs that it takes.

    Attributes:
        model: The policy.
        load: Loads or draws the parameters of its base.
        live: Whether the reference is run at each step.
        learning_rate: Constant rate of AdamW.
    """

    model: CausalLM
    load: Callable[[], Params]
    live: bool
    learning_rate: float

    @property
    def optimizer(self):
        """AdamW as in `qstar dpo`, at a constant rate."""
        return make_optimizer(OptimizerOptions(learning_rate=self.learning_rate, schedule="constant"), 1)

    def state(self, base: Params) -> TrainState:
        """The state before the first step; an adapter leaves its base frozen, which is then the reference too."""
        params, reference, frozen = base, None, None
        if self.model.lora is not None:
            params, frozen = jax.jit(self.model.init_adapter)(jax.random.key(1)), base
        elif self.live:
            reference = jax.tree.map(jnp.copy, base)
        return TrainState(jnp.int32(0), params, jax.jit(self.optimizer.init)(params), reference, frozen, jnp.bool(True))

    def compile(self, base: Params, batch: Batch, accumulate: int) -> jax.stages.Compiled:
        """Compiles a step; `base` may be abstract."""
        step = make_train_step(preference_loss_fn(self.model, make_loss()), self.optimizer, accumulate=accumulate)
        return jax.jit(step, donate_argnums=0).lower(jax.eval_shape(self.state, base), batch).compile()

    def step_flops(self, examples: list[Example], shared: bool) -> float:
        """Model FLOPs of a step: forward and backward (an adapter saves the weights' gradients), and the reference."""
        passes = (3 if self.model.lora is None else 2) + self.live
        return passes * model_flops(self.model.config, examples, shared)


@dataclass(frozen=True)
class Job:
    """The steps on one file of pairs.

    Attributes:
        trainer: Makes the step.
        pairs: Pairs per step.
        batches: The steps' batches.
        counts: What each of them holds, and the FLOPs that it needs.
        programs: Compiled step of each shape of a batch.
    """

    trainer: Trainer
    pairs: int
    batches: list[Batch]
    counts: list[dict[str, float]]
    programs: dict[tuple, jax.stages.Compiled]

    @classmethod
    def make(cls, trainer: Trainer, mesh: Mesh, options: DataOptions, path: str, batch: int, accumulate: int) -> "Job":
        """Reads the pairs, computes the reference's log-probabilities if they are to be cached, and compiles."""
        examples = read_pairs(path)
        steps = len(examples) // batch
        examples = examples[: steps * batch]
        # Training shuffles: here so that it brings back the order of the file, which is that of the other libraries.
        order = np.concatenate([step_indices(0, step, steps * batch, batch) for step in range(steps)])
        placed = [example for _, example in sorted(zip(order, examples, strict=True), key=lambda pair: pair[0])]
        with use_mesh(mesh, trainer.model.compute.dtype):
            feeder = Feeder(Dataset(placed, (), path), batch, mesh, options, "batch", accumulate=accumulate)
            if not trainer.live:
                feeder = with_reference(trainer, feeder, mesh, options)
            batches = [feeder.at_step(0, step) for step in range(steps)]
            abstract = trainer.model.base.abstract_params()
            base = abstract_with_shardings(abstract, param_shardings(trainer.model.base, mesh, MeshOptions()))
            shapes = {_shape(b): b for b in batches}
            programs = {shape: trainer.compile(base, b, accumulate) for shape, b in shapes.items()}
        shared = options.layout != "plain"
        counts = [
            {
                "tokens": int((b.blocks >= 0).sum()),
                "slots": b.tokens.size,
                "flops": trainer.step_flops(examples[step * batch :][:batch], shared),
                "plain_flops": trainer.step_flops(examples[step * batch :][:batch], False),
            }
            for step, b in enumerate(batches)
        ]
        return cls(trainer, batch, batches, counts, programs)

    def run(self, turns: Turns):
        """Trains as long as more steps are wanted."""
        state = self.trainer.state(self.trainer.load())
        for batch, counts in itertools.cycle(zip(self.batches, self.counts, strict=True)):
            state, metrics = self.programs[_shape(batch)](state, batch)
            total, examples = jax.device_get(metrics["loss"])
            if not turns.wants_more(float(total / examples), self.pairs, **counts):
                return

    @property
    def step_bytes(self) -> int:
        """Memory of the largest program: its arguments, and what it needs beside them."""
        analyses = [program.memory_analysis() for program in self.programs.values()]
        return max(a.argument_size_in_bytes + a.temp_size_in_bytes for a in analyses)

    @property
    def attention(self) -> str:
        """What computes attention: cuDNN, if the programs call it, else what the options say."""
        called = all("__cudnn$fmha" in program.as_text() for program in self.programs.values())
        return "cudnn" if called else self.trainer.model.compute.attention


def _shape(batch: Batch) -> tuple:
    return tuple(x.shape for x in jax.tree.leaves(batch))


def with_reference(trainer: Trainer, feeder: Feeder, mesh: Mesh, options: DataOptions) -> Feeder:
    """Gives a feeder the reference's log-probabilities."""
    model, examples = trainer.model.base, feeder.dataset.examples
    params, logprobs = trainer.load(), jax.jit(lambda params, batch: score_policy(model, params, batch).logp)
    in_order = Feeder(feeder.dataset, feeder.batch_size, mesh, options, "batch").in_order()
    values = np.concatenate([logprobs(params, b) for b in in_order])
    return feeder.with_reference(
        [[values[i, r, : len(a.ids)] for r, a in enumerate(e.responses)] for i, e in enumerate(examples)]
    )


def peak_memory_bytes() -> int:
    """The largest memory so far: of the accelerator, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else process_peak_bytes()


def trace(folder: str) -> AbstractContextManager:
    """Records what runs on the device, not Python's own calls."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.enable_hlo_proto = 0, False
    return jax.profiler.trace(folder, profiler_options=options)


def main(
    model: str,
    pairs: list[str],
    batch: int = 4,
    accumulate: list[int] = [1],  # noqa: B006
    reference: Literal["live", "cached"] = "live",
    compute: ComputeOptions = ComputeOptions(),
    learning_rate: float = 1e-6,
    layout: Layout = "packed",
    row_length: int = 0,
    lora_rank: int = 0,
):
    """Waits for requests and trains.

    Args:
        model: Hugging Face folder, or a config.json alone (or its folder), whose weights are then random.
        pairs: Files of the pairs' tokens.
        batch: Pairs per step.
        accumulate: Micro-batches per step; one number, or one for each file.
        reference: Run at each step, or computed before.
        compute: Dtypes, attention and rematerialization.
        learning_rate: Of AdamW, constant.
        layout: How prompts and answers share rows.
        row_length: Slots of a packed row; 0 takes those of the longest pair.
        lora_rank: Rank of an adapter on all linear layers; 0 trains the whole model.
    """
    answers = sys.stdout
    with answering(answers):
        mesh = make_mesh()
        base, load = open_model(model, compute, mesh)
        policy = base.with_lora(lora_rank, 2.0 * lora_rank) if lora_rank else base
        trainer = Trainer(policy, load, reference == "live", learning_rate)
        options = DataOptions(layout=layout, row_length=row_length)
        # XLA compiles without Python's lock, so the programs of all files take the time of one, given the cores.
        accumulate = accumulate * len(pairs) if len(accumulate) == 1 else accumulate
        with ThreadPoolExecutor() as pool:
            make = partial(Job.make, trainer, mesh, options, batch=batch)
            jobs = list(pool.map(lambda path, parts: make(path, accumulate=parts), pairs, accumulate))
        device = jax.devices()[0]
        turns = Turns(
            answers,
            peak_memory_bytes,
            trace,
            jax=jax.__version__,
            device=device.device_kind,
            parameters=sum(x.size for x in jax.tree.leaves(base.abstract_params())),
            compute=asdict(compute),
            layout=layout,
            accumulate=accumulate,
            programs=sum(len(job.programs) for job in jobs),
            step_bytes=[job.step_bytes for job in jobs],
            attention=[job.attention for job in jobs],
            datasheet_flops=None if device.platform == "cpu" else peak_flops([device]),
        )
        with use_mesh(mesh, compute.dtype):
            for index in turns.begun():
                turns.facts["matmul_flops"] = measured_matmul_peak(compute.dtype)  # while the other libraries wait
                jobs[index].run(turns)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
