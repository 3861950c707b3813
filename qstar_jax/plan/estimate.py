"""What a step of training needs on GPUs for which nothing can be compiled here, from shapes alone.

Arguments are exact, and what JAX keeps for the backward pass is traced. The rest are short formulas of what a compiler
allocates and moves on top of that, with factors that were fitted to programs compiled for an H100.
`tests/plan/test_estimate.py` compares them, and says how far off they are.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from qstar_jax.models import CausalLM
from qstar_jax.models.logprobs import CHUNK
from qstar_jax.plan.needs import Needs
from qstar_jax.plan.step import AbstractStep, mean_context
from qstar_jax.sharding import AXES
from qstar_jax.training.diagnostics.estimate import bytes_on_device, estimate

# Fitted: how often arrays of certain shapes are written or read.
LIVE = 4  # arrays as wide as the residual stream and the MLP, alive in the backward pass of a layer
MOVED = 15  # the same, read and written in a pass through a layer
LOGITS_MOVED = 10  # arrays of logits, read and written, forward and backward
SCORES_MOVED = 9  # arrays of attention scores, read and written in a pass through a layer, where cuDNN cannot be used


def abstract_gpus(sizes: Mapping[str, int], kind: str) -> AbstractMesh:
    """Returns a mesh of NVIDIA GPUs that are not there.

    Args:
        sizes: Size of each axis.
        kind: Name of the GPU.
    """
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    axes = tuple(sizes[axis] for axis in AXES)
    return AbstractMesh(axes, AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=device)


def estimate_step(step: AbstractStep, mesh: AbstractMesh) -> Needs:
    """Estimates the needs of a step of training."""
    devices = math.prod(mesh.shape.values())
    memory = _step_memory(step, mesh)
    return Needs(
        memory=memory,
        flops={"needed": step.flops / devices, "program": _step_flops(step, mesh)},
        collectives=_step_collectives(step, mesh),
        memory_traffic=_step_traffic(step, mesh, memory),
        tokens=step.tokens,
    )


def _step_memory(step: AbstractStep, mesh: AbstractMesh) -> dict[str, int]:
    accumulate, model, tensor = step.plan.config.train.accumulate, step.model, mesh.shape["tensor"]
    # cuDNN keeps as much as blockwise attention, which can be traced where there is no cuDNN.
    compute = replace(model.compute, attention="blockwise") if _may_use_cudnn(model) else model.compute
    loss_fn = step.plan.objective.loss_fn(replace(model, compute=compute))
    with use_abstract_mesh(mesh):
        kept = estimate(loss_fn, step.state, step.batch, mesh, flops=0.0, steps=1, accumulate=accumulate).memory
    arguments = bytes_on_device((step.state, step.batch))
    temporary = {name: kept[name] for name in ("gradients", "activations")}
    temporary["activations"] //= tensor
    temporary["gathered matrices"] = _gathered_bytes(step, mesh)
    # The backward pass of a layer, or of a chunk of logits, whichever is larger.
    slots, scored = _slots(step, mesh)
    layer = LIVE * bytes_per_slot(model, tensor) * slots
    logits = 4 * min(CHUNK, scored) * model.config.vocab_size
    if model.lora:
        logits += 4 * _table_size(model)  # the gradient of the head, which nobody reads
    temporary["one layer" if layer > logits else "a chunk of logits"] = max(layer, logits)
    parts = {name: kept[name] for name in ("policy", "reference", "optimizer")} | temporary
    return {name: size for name, size in parts.items() if size} | totals(arguments, sum(temporary.values()))


def _gathered_bytes(step: AbstractStep, mesh: AbstractMesh) -> int:
    """Matrices that a device holds whole for a time: those of two layers, and the tables with their gradients."""
    config, size = step.model.config, itemsize(step.model)
    if mesh.shape["data"] * mesh.shape["fsdp"] == 1:
        return 0
    tables = _table_size(step.model) * (1 if config.tie_word_embeddings else 2)
    held = tables * (size if step.model.lora else size + 4)
    if mesh.shape["fsdp"] > 1:
        held += 2 * size * _layers_size(step.model) // config.num_hidden_layers
    return held // mesh.shape["tensor"]


def _passes(step: AbstractStep) -> tuple[int, int, int]:
    """Passes of a batch through the layers: forward and recomputed ones, backward ones, and those that only score."""
    scoring = int(step.plan.runs_reference)
    if step.plan.objective.prepare and step.plan.config.train.accumulate > 1:
        scoring = 2 * scoring + 1  # first, and again
    forward = 1 if step.plan.config.compute.remat in ("none", "dots") else 2
    return forward, 2 if step.model.lora is None else 1, scoring


def _step_flops(step: AbstractStep, mesh: AbstractMesh) -> float:
    """FLOPs of the program, on a device: padding too, and what the backward pass recomputes."""
    forward_flops, (slots, scored) = step.model.config.forward_flops, _slots(step, mesh)
    forward, backward, reference = _passes(step)
    context = mean_context(step.plan, step.examples) if _uses_cudnn(step.model) else step.batch.tokens.shape[-1]
    layers = forward_flops(tokens=slots, scored_tokens=0, context=context)
    head = forward_flops(tokens=0, scored_tokens=scored, context=0)
    flops = layers * (forward + backward + reference) + head * (4 + reference)
    if step.plan.config.compute.remat == "attention":  # all but that is recomputed
        flops -= layers - forward_flops(tokens=slots, scored_tokens=0, context=0)
    return flops * step.plan.config.train.accumulate / mesh.shape["tensor"]


def _step_collectives(step: AbstractStep, mesh: AbstractMesh) -> dict[str, dict[str, float]]:
    """Matrices are gathered for each pass and gradients scattered; along `tensor`, activations are summed."""
    data, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
    config, model, size = step.plan.config, step.model, itemsize(step.model)
    layers, accumulate = model.config.num_hidden_layers, config.train.accumulate
    matrices = (_layers_size(model) + _table_size(model) * (1 if model.config.tie_word_embeddings else 2)) * size
    trained = sum(x.size for x in jax.tree.leaves(step.state.params)) * size
    forward, _, reference = _passes(step)
    # Frozen matrices are gathered as the others are; gradients of an adapter are small.
    gathers = accumulate * (2 + reference)
    found = {}
    if fsdp > 1:
        share = (fsdp - 1) / fsdp / tensor
        found["all-gather"] = gathers * layers, gathers * matrices * share
        found["reduce-scatter"] = accumulate * layers, accumulate * trained * share
    # Two sums per layer and pass along `tensor`, and one of the gradients along `data`.
    if data > 1 or tensor > 1:
        sums = 2 * layers * accumulate * (forward + 1 + reference)
        activations = sums * size * model.config.hidden_size * _slots(step, mesh)[0] * 2 * (tensor - 1) / tensor
        gradients = trained / fsdp / tensor * 2 * (data - 1) / data
        found["all-reduce"] = sums * (tensor > 1) + layers * (data > 1), activations + gradients
    return {kind: {"count": float(count), "bytes": nbytes} for kind, (count, nbytes) in found.items()}


def _step_traffic(step: AbstractStep, mesh: AbstractMesh, memory: Mapping[str, int]) -> float:
    config, model, accumulate = step.model.config, step.model, step.plan.config.train.accumulate
    (slots, scored), length = _slots(step, mesh), step.batch.tokens.shape[-1]
    # The optimizer reads its state and writes it; gradients are written, scaled, measured and read.
    trained = bytes_on_device((step.state.params, step.state.opt_state))
    state = memory["arguments"] + trained + 4 * accumulate * memory["gradients"]
    # Forward, twice as much backward, and once to recompute activations, or to write and read them.
    passes, tensor = 4 + _passes(step)[2], mesh.shape["tensor"]
    weights = passes * itemsize(model) * (_layers_size(model) + _table_size(model)) / tensor
    per_slot = MOVED * bytes_per_slot(model, tensor)
    if not _uses_cudnn(step.model):
        per_slot += SCORES_MOVED * 4 * config.num_attention_heads * length / tensor
    layers = passes * config.num_hidden_layers * per_slot * slots
    logits = LOGITS_MOVED * 4 * scored * config.vocab_size / tensor
    return state + accumulate * (weights + layers + logits)


def _may_use_cudnn(model: CausalLM) -> bool:
    return model.compute.attention in ("auto", "cudnn")


def _uses_cudnn(model: CausalLM) -> bool:
    return _may_use_cudnn(model) and model.compute.dtype == "bfloat16"


def bytes_per_slot(model: CausalLM, tensor: int) -> int:
    """Returns the bytes per token of the residual stream and of a device's share of the MLP, together."""
    return itemsize(model) * (model.config.hidden_size + model.config.intermediate_size // tensor)


def itemsize(model: CausalLM) -> int:
    """Returns the bytes of an activation."""
    return jnp.dtype(model.compute.dtype).itemsize


def totals(arguments: int, temporary: int) -> dict[str, int]:
    """Returns the sums of bytes under the names that those of compiled programs have."""
    return {"arguments": arguments, "temporary": temporary, "total": arguments + temporary}


def _table_size(model: CausalLM) -> int:
    return model.config.vocab_size * model.config.hidden_size


def _layers_size(model: CausalLM) -> int:
    return sum(x.size for x in jax.tree.leaves(model.base.abstract_params()["layers"]))


def _slots(step: AbstractStep, mesh: AbstractMesh) -> tuple[int, int]:
    """Slots of the sequences of a device and a micro-batch, and scored ones."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return tuple(math.prod(x.shape[-2:]) // shards for x in (step.batch.tokens, step.batch.slots))
