"""Steps compiled for pods: what a chip sends and holds depends on its own share of the batch, and on no other's."""

from functools import cache

import jax
import pytest

from qstar_jax.config import (
    ComputeOptions,
    DataOptions,
    DpoConfig,
    LoraOptions,
    MeshOptions,
    ReferenceOptions,
    TrainOptions,
)
from qstar_jax.models import CausalLM
from qstar_jax.plan.costs import collectives
from qstar_jax.plan.step import CompiledProgram, lower_step, pairs_of_lengths
from qstar_jax.sharding import make_mesh
from qstar_jax.training.plan import make_plan

MODEL = {
    "model_type": "llama", "vocab_size": 16384, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 2,
    "num_attention_heads": 20, "num_key_value_heads": 20, "head_dim": 128, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
LARGEST = 16384 * 2560  # elements of the largest matrix


@pytest.fixture(scope="module")
def step_on(devices_of):
    """Compiles a step of so many pairs on fully sharded parameters; also returns its model FLOPs per device."""

    @cache
    def compiled(
        topology: str, pairs: int, accumulate: int = 1, rank: int = 0, mode: str = "auto"
    ) -> tuple[CompiledProgram, float]:
        devices = devices_of(topology)
        compute, mesh = ComputeOptions(dtype="bfloat16", remat="full"), MeshOptions(data=1, fsdp=len(devices))
        sections = {"train": TrainOptions(batch_size=pairs, accumulate=accumulate), "lora": LoraOptions(rank=rank)}
        sections |= {"reference": ReferenceOptions(mode=mode), "data": DataOptions(train="pairs")}
        plan = make_plan(DpoConfig(model="", out="", compute=compute, mesh=mesh, **sections))
        examples = pairs_of_lengths(384, 48, pairs)
        step = lower_step(plan, CausalLM.from_hf(MODEL, compute), examples, make_mesh(mesh, devices))
        return CompiledProgram(step.lowered.compile(), len(devices)), step.flops / len(devices)

    return compiled


def wire_bytes(program):
    return sum(program.wire_bytes.values())


def check_that_only_parameters_travel(program, times: int = 3 + 1):
    """Matrices are gathered for the policy, its backward pass and the reference; gradients are scattered."""
    params = jax.tree.leaves(CausalLM.from_hf(MODEL).abstract_params())
    matrices = 2 * sum(x.size for x in params if x.ndim > 1)
    assert wire_bytes(program) < 1.1 * times * matrices
    for item in collectives(program.module, program.devices):
        assert item.array.size <= 1.1 * LARGEST, item  # which may be padded to whole tiles
        assert item.kind != "all-reduce" or item.array.nbytes < 1e6, item  # norms and adapters, no matrix


def test_a_chip_sends_what_the_parameters_cost_whatever_the_batch_is(step_on):
    (small, _), (large, _) = step_on("v5e:4x4", 16), step_on("v5e:4x4", 64)
    assert wire_bytes(large) == pytest.approx(wire_bytes(small), rel=0.01)
    for program in (small, large):
        check_that_only_parameters_travel(program)


def test_a_chip_of_a_larger_slice_sends_and_holds_no_more(step_on):
    (small, _), (large, _) = step_on("v5e:4x4", 16), step_on("v5e:8x8", 64)
    check_that_only_parameters_travel(large)
    assert wire_bytes(large) < 1.1 * wire_bytes(small)
    assert large.memory["temporary"] < 1.1 * small.memory["temporary"]


def test_memory_is_linear_in_the_examples_of_a_chip(step_on):
    one, four = (step_on("v5e:4x4", pairs)[0].memory["temporary"] for pairs in (16, 64))
    assert four < 4 * one


def test_chips_do_not_repeat_each_others_work(step_on):
    program, needed = step_on("v5e:4x4", 16)
    # Needed: policy, twice as much backward, reference; with recomputation the policy again.
    assert sum(program.flops.values()) < 1.2 * needed * 5 / 4


def test_gradients_of_a_frozen_base_do_not_travel_nor_does_a_cached_reference(step_on):
    program, _ = step_on("v5e:4x4", 32, accumulate=2, rank=8, mode="cached")
    check_that_only_parameters_travel(program, times=2 * 2)  # for both passes of two micro-batches
