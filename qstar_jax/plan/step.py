"""The step that a run would take, compiled from shapes alone: nothing is read, nothing is allocated."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from qstar_jax.data.batches import Batch
from qstar_jax.data.feeder import Feeder
from qstar_jax.data.loading import Dataset
from qstar_jax.data.packing import blocks_of
from qstar_jax.data.ragged import Lengths
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.models import CausalLM
from qstar_jax.plan.costs import Product, collectives, kernels, memory_traffic, opaque_kernels, products
from qstar_jax.plan.hlo import Module
from qstar_jax.sharding import use_mesh
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.setup import abstract_state, jit_step, with_adapter
from qstar_jax.training.step import TrainState


def pairs_of_lengths(prompt: int, response: int, count: int) -> list[Example]:
    """Returns pairs of which only the lengths matter, in tokens."""
    ids = np.zeros(response, np.int32)
    return [Example(np.zeros(prompt, np.int32), False, (Response(ids, False),) * 2, row) for row in range(count)]


@dataclass(frozen=True)
class AbstractStep:
    """Shapes of a step; nothing of it needs to be there.

    Attributes:
        plan: Options and objective of the run.
        model: Its model, with its adapter.
        optimizer: Its optimizer.
        state: Shapes and shardings of its state.
        batch: Those of its batch.
        examples: Its examples.
    """

    plan: RunPlan
    model: CausalLM
    optimizer: optax.GradientTransformation
    state: TrainState
    batch: Batch
    examples: Sequence[Example]

    @property
    def flops(self) -> float:
        """Model FLOPs, over all devices."""
        return step_flops(self.plan, self.model, self.examples)

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return int(blocks_of(self.examples, self.plan.config.data.layout).lengths.sum())


@dataclass(frozen=True)
class LoweredStep:
    """A step, ready to be compiled.

    Attributes:
        lowered: The program.
        batch: Shapes and shardings of its batch.
        flops: Model FLOPs, over all devices.
        tokens: Tokens of all texts.
    """

    unknown_trips: ClassVar[tuple[float, ...]] = ()

    lowered: jax.stages.Lowered
    batch: Batch
    flops: float
    tokens: int


def abstract_step(
    plan: RunPlan, model: CausalLM, examples: Sequence[Example], mesh: Mesh | AbstractMesh
) -> AbstractStep:
    """Returns the shapes of the first step of a run.

    Args:
        plan: Options and objective of the run.
        model: Its model, without an adapter.
        examples: Its examples, or some that are as long.
        mesh: Devices that are there, or those of a topology, or none at all.

    Raises:
        InputError: If the options do not fit the model or the mesh.
    """
    options = plan.config.train
    model = with_adapter(model, plan.config.lora)
    dataset = Dataset(list(examples), (), plan.config.data.train)
    feeder = Feeder(
        dataset, options.batch_size, mesh, plan.config.data, "train.batch_size", accumulate=options.accumulate
    )
    if plan.reference.mode == "cached":
        feeder = feeder.with_reference([[np.zeros(len(r.ids), np.float32) for r in e.responses] for e in examples])
    if plan.objective.guided:
        feeder = feeder.with_guide([[np.zeros(len(r.ids), np.float32) for r in e.responses] for e in examples])
    optimizer = make_optimizer(plan.config.optimizer, options.steps or feeder.batches)
    state = abstract_state(plan, model, optimizer, mesh)
    in_step = [examples[i] for i in feeder.indices_at_step(options.seed, 0).reshape(-1)]
    return AbstractStep(plan, model, optimizer, state, feeder.shapes_at_step(options.seed, 0), in_step)


def lower_step(plan: RunPlan, model: CausalLM, examples: Sequence[Example], mesh: Mesh) -> LoweredStep:
    """Lowers the step of a run on a mesh whose devices need not be there; arguments as for `abstract_step`.

    Raises:
        InputError: If the options do not fit the model or the mesh.
    """
    step = abstract_step(plan, model, examples, mesh)
    with use_mesh(mesh, plan.config.compute.dtype):
        train_step = jit_step(plan, step.model, step.optimizer, step.state)
        lowered = train_step.lower(step.state, step.batch)
    return LoweredStep(lowered, step.batch, step.flops, step.tokens)


def step_flops(plan: RunPlan, model: CausalLM, examples: Sequence[Example]) -> float:
    """Counts the model FLOPs of a step on some examples: what it needs, if nothing is computed twice."""
    blocks = blocks_of(examples, plan.config.data.layout)
    tokens, scored = int(blocks.lengths.sum()), int(blocks.scored.sum())
    context = mean_context(plan, examples)
    forward = model.config.forward_flops(tokens=tokens, scored_tokens=scored, context=context)
    # An adapter saves the gradients of the weights, a third of the rest.
    return forward * ((3 if model.lora is None else 2) + plan.runs_reference)


def mean_context(plan: RunPlan, examples: Sequence[Example]) -> float:
    """Returns the mean number of keys that a token of some examples sees, in layers without a window."""
    blocks = blocks_of(examples, plan.config.data.layout)
    responses = Lengths.of(examples).responses[blocks.examples[:, None], blocks.responses]
    shared = blocks.lengths - responses.sum(1)
    keys = shared * (shared + 1) / 2 + (responses * shared[:, None] + responses * (responses + 1) / 2).sum(1)
    return float(keys.sum() / blocks.lengths.sum())


@dataclass(frozen=True)
class CompiledProgram:
    """What a compiled program needs on one device.

    Attributes:
        compiled: The program.
        devices: Devices that it runs on.
        unknown_trips: Trips assumed of loops whose number of trips depends on data (see `Module`).
    """

    compiled: jax.stages.Compiled
    devices: int
    unknown_trips: tuple[float, ...] = ()

    @cached_property
    def module(self) -> Module:
        """Its text, parsed."""
        return Module.parse(self.compiled.as_text(), self.unknown_trips)

    @cached_property
    def products(self) -> list[Product]:
        """Its matrix products."""
        return products(self.module)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes: of arguments, of temporaries, and of all that is held while it runs."""
        sizes = self.compiled.memory_analysis()
        fresh = sizes.output_size_in_bytes - sizes.alias_size_in_bytes  # outputs that take no argument's place
        arguments, temporary = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
        return {"arguments": arguments, "temporary": temporary, "total": arguments + temporary + fresh}

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs of matrix products by the dtype of their operands."""
        totals = Counter()
        for product in self.products:
            totals[product.dtype] += product.total
        return dict(totals)

    @property
    def kernels(self) -> dict[str, float]:
        """How often each kind of kernel runs, the most frequent first."""
        return dict(kernels(self.module).most_common())

    @property
    def traffic(self) -> float:
        """Bytes that its kernels read and write; of a GPU."""
        return memory_traffic(self.module)

    @property
    def opaque(self) -> dict[str, float]:
        """Runs of kernels whose products are not in `flops`."""
        return dict(opaque_kernels(self.module))

    @property
    def wire_bytes(self) -> dict[str, float]:
        """Bytes that are sent to other devices, by kind of transfer."""
        totals = Counter()
        for item in collectives(self.module, self.devices):
            totals[item.kind] += item.wire_bytes
        return dict(totals)
