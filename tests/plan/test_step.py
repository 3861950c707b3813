from dataclasses import replace

import jax
import pytest
from rich.console import Console

from qstar_jax.config import ComputeOptions, DataOptions, DpoConfig, LoraOptions, MeshOptions, TrainOptions
from qstar_jax.models import CausalLM
from qstar_jax.plan.step import CompiledProgram, lower_step, pairs_of_lengths, step_flops
from qstar_jax.sharding import make_mesh
from qstar_jax.training import run as run_module
from qstar_jax.training.plan import make_plan

SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
GPU = ComputeOptions(dtype="bfloat16", remat="dots")


def plan_of(**sections):
    sections = {"train": TrainOptions(batch_size=4), "compute": GPU} | sections
    return make_plan(DpoConfig(model="small", out="", data=DataOptions(train="pairs"), **sections))


def compiled_step(devices, compute=GPU, mesh=MeshOptions(), **sections) -> CompiledProgram:
    model, plan = CausalLM.from_hf(SMALL, compute), plan_of(compute=compute, mesh=mesh, **sections)
    step = lower_step(plan, model, pairs_of_lengths(256, 128, plan.config.train.batch_size), make_mesh(mesh, devices))
    return CompiledProgram(step.lowered.compile(), len(devices))


@pytest.mark.parametrize(
    "sections",
    [{}, {"lora": LoraOptions(rank=2), "train": TrainOptions(steps=1, batch_size=4, accumulate=2)}],
    ids=["all parameters", "an adapter, in micro-batches"],
)
def test_it_is_the_step_of_a_run(tmp_path, monkeypatch, hf_folder, train_file, tiny_model, on_devices, sections):
    seen = {}

    def load_inputs(*args):
        seen["inputs"] = real_load_inputs(*args)
        return seen["inputs"]

    def jit_step(*args):
        step = real_jit_step(*args)

        def run(state, batch):
            seen["text"] = step.lower(state, batch).as_text()
            return step(state, batch)

        return run

    real_load_inputs, real_jit_step = run_module.load_inputs, run_module.jit_step
    monkeypatch.setattr(run_module, "load_inputs", load_inputs)
    monkeypatch.setattr(run_module, "jit_step", jit_step)
    train = TrainOptions(steps=1, batch_size=4, reference_samples=0)
    data, mesh = DataOptions(train=str(train_file)), MeshOptions(data=2, min_shard_size=64)
    sections = {"train": train, "data": data, "mesh": mesh} | sections
    sections["train"] = replace(sections["train"], reference_samples=0)
    config = DpoConfig(model=str(hf_folder), out=str(tmp_path / "run"), **sections)
    with on_devices(2):
        run_module.train(config, Console(quiet=True))
    devices = make_mesh(mesh, jax.devices()[:2])
    planned = lower_step(make_plan(config), tiny_model, seen["inputs"].train.dataset.examples, devices)
    assert planned.lowered.as_text() == seen["text"]


def test_model_flops_by_hand(tiny_model):
    examples = pairs_of_lengths(11, 4, 2)
    tokens, scored = 2 * (10 + 8), 2 * 8
    # The prompt sees itself; each response sees the prompt, but for its last token, and itself.
    keys = 2 * (10 * 11 / 2 + 2 * (4 * 10 + 4 * 5 / 2))
    forward = tiny_model.config.forward_flops(tokens=tokens, scored_tokens=scored, context=keys / tokens)
    plan = plan_of()
    assert step_flops(plan, tiny_model, examples) == 4 * forward
    assert step_flops(plan, tiny_model.with_lora(2, 4.0), examples) == 3 * forward
    plain = replace(plan, config=replace(plan.config, data=DataOptions(train="pairs", layout="plain")))
    keys = 4 * (14 * 15 / 2)
    forward = tiny_model.config.forward_flops(tokens=4 * 14, scored_tokens=scored, context=keys / (4 * 14))
    assert step_flops(plain, tiny_model, examples) == pytest.approx(4 * forward)


def test_products_of_a_step_by_hand():
    compute = ComputeOptions(attention="dense")
    program, config = compiled_step(jax.devices()[:1], compute), CausalLM.from_hf(SMALL).config
    # Dense attention computes all scores of four sequences of 512 slots, with 256 responses' tokens each.
    forward = config.forward_flops(tokens=4 * 512, scored_tokens=4 * 256, context=512)
    # Policy, twice as much backward, reference. Of a single chunk, the compiler keeps the logits for the backward pass.
    assert program.flops == {"f32": 4 * forward}
    assert program.memory["total"] > program.memory["arguments"] > 0
    assert program.wire_bytes == {} and program.opaque == {}


def test_a_step_on_an_h100_attends_by_cudnn_in_bfloat16(devices_of):
    devices = devices_of("h100:1x1x1")
    programs = {name: compiled_step(devices, replace(GPU, attention=name)) for name in ("auto", "cudnn", "dense")}
    kernels = programs["auto"].kernels
    assert kernels == programs["cudnn"].kernels
    # Forward for the policy, the reference and the backward pass, in each of two layers.
    assert (kernels["__cudnn$fmhaSoftmax"], kernels["__cudnn$fmhaSoftmaxBackward"]) == (6, 2)
    assert set(programs["auto"].flops) == {"bf16"}
    assert programs["auto"].memory["temporary"] < programs["dense"].memory["temporary"]
    assert not programs["auto"].opaque


def test_a_step_on_several_h100s(devices_of):
    devices = devices_of("h100:1x1x4")
    one = compiled_step(devices[:1])
    four = compiled_step(devices, mesh=MeshOptions(fsdp=4, data=1))
    assert four.memory["arguments"] < 0.3 * one.memory["arguments"]
    assert four.wire_bytes and not one.wire_bytes
    assert "__cudnn$fmhaSoftmax" in four.kernels
