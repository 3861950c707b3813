import json
from dataclasses import replace

import jax
import pytest

from qstar_jax.config import ComputeOptions, DataOptions, DecodeOptions, MeshOptions, PlanConfig, TrainOptions
from qstar_jax.errors import InputError
from qstar_jax.plan import plan as plan_module
from qstar_jax.plan import topology as topology_module
from qstar_jax.plan.options import examples_of
from qstar_jax.plan.plan import make_run_plan
from qstar_jax.plan.topology import chip_of

DATA = DataOptions(max_length=64, max_prompt_length=48)


@pytest.fixture
def config(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    return PlanConfig(
        model=str(tmp_path), out=str(tmp_path / "plan"), data=DATA, train=TrainOptions(batch_size=8),
        mesh=MeshOptions(data=1, fsdp=-1, min_shard_size=64),
    )  # fmt: skip


@pytest.fixture
def cpus(monkeypatch):
    for module in (plan_module, topology_module):
        monkeypatch.setattr(module, "topology_devices", lambda topology: jax.devices())


def test_a_plan_from_a_config_json_alone(config, cpus):
    plan, chip = make_run_plan(config, "v5e:2x4"), chip_of("v5e:2x4")
    assert plan.fits and plan.devices == 8 and plan.memory_limit == chip.memory_bytes
    needs = plan.needs
    assert needs.memory["total"] >= needs.memory["arguments"] + needs.memory["temporary"] > 0
    assert needs.flops["program"] > needs.flops["needed"] > 0
    sent = sum(item["bytes"] for item in needs.collectives.values())
    assert needs.collectives["all-gather"]["count"] >= 1 and sent > 0
    assert plan.seconds == {
        "arithmetic": needs.flops["program"] / 197e12,
        "memory": needs.memory_traffic / chip.memory_bandwidth,
        "network": sent / chip.network_bandwidth,
    }
    longest = max(plan.seconds.values())
    assert plan.seconds[plan.binds] == longest and plan.tokens_per_second == needs.tokens / longest
    assert plan.expected_mfu == pytest.approx(needs.flops["needed"] / 197e12 / longest)
    stored = json.loads(json.dumps(plan.to_json()))
    assert stored["fits"] is True and stored["binds"] == plan.binds and stored["compile_seconds"] > 0
    assert stored["estimate"] is False and stored["memory"] == needs.memory and stored["tokens"] == 8 * (47 + 2 * 16)


def test_devices_share_the_memory_and_the_rates_of_a_chip(config, cpus):
    whole, half = make_run_plan(config, "tpu7x:2x2x2"), make_run_plan(config, "tpu7x:2x2x1")
    assert half.memory_limit == whole.memory_limit / 2
    assert half.seconds == {name: pytest.approx(2 * seconds) for name, seconds in whole.seconds.items()}
    assert half.expected_mfu == pytest.approx(whole.expected_mfu)


def test_a_plan_whose_bytes_exceed_the_memory_does_not_fit(config, cpus):
    plan = make_run_plan(config, "v5e:2x4")
    assert not replace(plan, memory_limit=plan.needs.memory["total"] - 1).fits
    assert replace(plan, memory_limit=plan.needs.memory["total"]).fits


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: 20G of 15G hbm\nmore", "INTERNAL: broken"])
def test_a_program_that_the_compiler_finds_no_room_for(config, cpus, monkeypatch, message):
    def compile_(self, *_, **__):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    if message.startswith("INTERNAL"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
            make_run_plan(config, "v5e:2x4")
    else:
        plan = make_run_plan(config, "v5e:2x4")
        assert not plan.fits and plan.binds is None and plan.refusal == "RESOURCE_EXHAUSTED: 20G of 15G hbm"
        assert plan.to_json()["fits"] is False and plan.needs.flops["needed"] > 0


def test_an_sft_step_has_one_response_and_no_reference(config, cpus):
    sft = replace(config, verb="sft")
    assert {len(example.responses) for example in examples_of(sft)} == {1}
    pair, single = (make_run_plan(options, "v5e:2x4").needs for options in (config, sft))
    assert single.memory["arguments"] < pair.memory["arguments"] and single.flops["needed"] < pair.flops["needed"]


def test_a_search_for_responses(config, cpus):
    decode = DecodeOptions(method="beam", beams=3, max_new_tokens=8, return_sequences=2)
    config = replace(config, verb="generate", decode=decode, mesh=MeshOptions(min_shard_size=64))
    plan = make_run_plan(config, "v5e:2x4")
    assert plan.fits and plan.needs.tokens == 4 * 2 * 8
    assert plan.tokens_per_second == plan.needs.tokens / max(plan.seconds.values())
    twice = make_run_plan(replace(config, batch_size=8), "v5e:2x4").needs
    assert twice.tokens == 2 * plan.needs.tokens and twice.flops["needed"] == 2 * plan.needs.flops["needed"]
    mesh = MeshOptions(data=1, tensor=8, min_shard_size=64)
    sharded = make_run_plan(replace(config, mesh=mesh), "v5e:2x4").needs
    assert sharded.memory["arguments"] < plan.needs.memory["arguments"] and "all-reduce" in sharded.collectives


def test_a_mesh_that_does_not_divide(config, cpus):
    with pytest.raises(InputError, match=r"mesh data=1, fsdp=3.*8 device"):
        make_run_plan(replace(config, mesh=MeshOptions(data=1, fsdp=3)), "v5e:2x4")
    with pytest.raises(InputError, match=r"train.batch_size 12 does not divide"):
        make_run_plan(replace(config, train=TrainOptions(batch_size=12)), "v5e:2x4")


@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:1x1x4"])
def test_real_topologies(config, devices_of, topology):
    devices_of(topology)  # or the test is skipped
    plan = make_run_plan(replace(config, compute=ComputeOptions(dtype="bfloat16")), topology)
    assert plan.fits and plan.devices == 4 and plan.needs.collectives and 0 < plan.expected_mfu <= 1
