from dataclasses import replace

import pytest

from qstar_jax.config import (
    ComputeOptions,
    DecodeOptions,
    LoraOptions,
    LossOptions,
    MeshOptions,
    PlanConfig,
    ReferenceOptions,
    TrainOptions,
)
from qstar_jax.errors import InputError
from qstar_jax.plan import search
from qstar_jax.plan.needs import Needs
from qstar_jax.plan.plan import Plan
from qstar_jax.plan.search import find_settings, find_slice
from qstar_jax.plan.topology import chip_count

GIVEN = PlanConfig(model="x", out="x", train=TrainOptions(batch_size=32))


@pytest.fixture
def planned(monkeypatch):
    """`planned(fits)` makes every plan say what `fits(config, topology)` says, and lists the configs."""

    def mesh_sizes(config, topology):
        devices, tensor = chip_count(topology), config.mesh.tensor or 1
        if devices % tensor:
            raise InputError("mesh")
        return {"data": 1, "fsdp": devices // tensor, "tensor": tensor}

    def prepare(fits):
        configs = []

        def make_run_plan(config, topology):
            configs.append(config)
            total = 1 if fits(config, topology) else 3
            return Plan(topology, 8, False, 2, Needs({"total": total}, {}, {}, 0.0, 0))

        monkeypatch.setattr(search, "make_run_plan", make_run_plan)
        return configs

    monkeypatch.setattr(search, "mesh_sizes", mesh_sizes)
    return prepare


def no_report(change, plan):
    pass


ORDER = [
    "train.accumulate 2", "train.accumulate 4", "compute.remat attention", "compute.remat full",
    "reference.mode cached", "lora.rank 16", "compute.param_dtype bfloat16",
]  # fmt: skip


def test_what_fits_is_left_alone(planned):
    configs = planned(lambda config, topology: True)
    assert find_settings(GIVEN, "v5e:2x4", no_report)[0] == [] and configs == [GIVEN]


@pytest.mark.parametrize("last", range(len(ORDER)), ids=ORDER)
def test_the_first_setting_that_fits(planned, last):
    calls = iter(range(100))
    configs = planned(lambda config, topology: next(calls) == last + 1)
    seen = []
    changes, found, plan = find_settings(GIVEN, "v5e:2x4", lambda change, plan: seen.append((change, plan.fits)))
    # Of each option, the last value.
    assert changes == [" ".join(change) for change in dict(change.split() for change in ORDER[: last + 1]).items()]
    assert plan.fits and found is configs[-1]
    assert seen == [("as given", False), *((change, change == ORDER[last]) for change in ORDER[: last + 1])]
    # Each change is on top of those before it.
    values = dict(change.split() for change in changes)
    for name, value in values.items():
        block, option = name.split(".")
        assert str(getattr(getattr(configs[-1], block), option)) == value


def test_only_what_helps_is_tried(planned):
    configs = planned(lambda config, topology: False)
    coupled = PlanConfig(model="x", out="x", loss=LossOptions(name="simpo"), lora=LoraOptions(rank=4))
    with pytest.raises(InputError, match=r"remat full, compute.param_dtype bfloat16;"):
        find_settings(coupled, "v5e:4x8", no_report)
    assert len(configs) == 4
    with pytest.raises(InputError, match="v5e:2x4 does not hold this run; a step needs"):
        find_settings(PlanConfig(model="x", out="x", search=False), "v5e:2x4", no_report)


def test_a_moving_reference_stays_live(planned):
    planned(lambda config, topology: False)
    moving = PlanConfig(model="x", out="x", reference=ReferenceOptions(sync_every=10))
    with pytest.raises(InputError, match=r"remat full, compute.param_dtype bfloat16;"):
        find_settings(moving, "v5e:2x4", no_report)


SEARCH = PlanConfig(model="x", out="x", verb="generate", decode=DecodeOptions(method="beam"))


@pytest.mark.parametrize(
    ("config", "order"),
    [
        (SEARCH, "mesh.tensor 8, batch_size 1, compute.param_dtype bfloat16, compute.dtype bfloat16"),
        (
            PlanConfig(
                model="x", out="x", verb="generate", mesh=MeshOptions(data=1, tensor=8),
                compute=ComputeOptions(param_dtype="bfloat16"), batch_size=3,
            ),
            "batch_size 1, compute.dtype bfloat16",
        ),
        # Stochastic beams take one prompt at a time.
        (
            PlanConfig(model="x", out="x", verb="generate", decode=DecodeOptions(method="beam", stochastic=True)),
            "mesh.tensor 8, compute.param_dtype bfloat16, compute.dtype bfloat16",
        ),
    ],
    ids=["beams", "sharded already", "one at a time"],
)  # fmt: skip
def test_settings_of_a_search(planned, config, order):
    configs = planned(lambda config, topology: False)
    with pytest.raises(InputError, match=rf"not even with {order}; a search needs"):
        find_settings(config, "v5e:2x4", no_report)
    last = configs[-1]
    assert (last.compute.param_dtype, last.compute.dtype, last.mesh.tensor) == ("bfloat16", "bfloat16", 8)
    assert last.batch_size == 1 or config.decode.stochastic


def test_the_smallest_slice_for_a_search(planned):
    planned(lambda config, topology: topology == "v5e:2x2")
    assert find_slice(replace(SEARCH, topologies="v5e", batch_size=3), no_report).topology == "v5e:2x2"


def test_the_smallest_slice_that_holds_a_run(planned):
    planned(lambda config, topology: topology == "v5e:4x4")
    config = PlanConfig(model="x", out="x", topologies="v5e", mesh=MeshOptions(data=1, fsdp=-1, tensor=2))
    seen = []
    assert find_slice(config, lambda change, plan: seen.append(plan.topology)).topology == "v5e:4x4"
    assert seen == ["v5e:2x2", "v5e:2x4", "v5e:4x4"]  # 1x1 does not suit the mesh


def test_a_run_that_no_slice_holds(planned):
    planned(lambda config, topology: False)
    with pytest.raises(
        InputError, match=r"suits the mesh and train.batch_size 32 holds this run; tried v5e:1x1, .*, v5e:4x8$"
    ):
        find_slice(PlanConfig(model="x", out="x", topologies="v5e"), no_report)
    with pytest.raises(InputError, match=r"no slice of v5e suits the mesh and train.batch_size 1"):
        find_slice(
            PlanConfig(
                model="x", out="x", topologies="v5e", train=TrainOptions(batch_size=1), mesh=MeshOptions(tensor=999)
            ),
            no_report,
        )
    planned(lambda config, topology: False)
    with pytest.raises(InputError, match=r"suits the mesh holds this run; .*v5e:16x16; .*--mesh.tensor -1 shards them"):
        find_slice(replace(SEARCH, topologies="v5e"), no_report)
    with pytest.raises(InputError, match=r"v5e:16x16$"):
        find_slice(replace(SEARCH, topologies="v5e", mesh=MeshOptions(data=1, tensor=4)), no_report)
    with pytest.raises(InputError, match=r"unknown chip 'a100'; expected one of v4, v5e, .* a100-40gb, a100-80gb"):
        find_slice(PlanConfig(model="x", out="x", topologies="a100"), no_report)


def test_a_search_keeps_each_copy_of_the_model_within_a_slice(planned):
    planned(lambda config, topology: (config.mesh.data, config.mesh.tensor) == (2, 4))
    assert find_settings(SEARCH, "2xv5e:2x2", no_report)[0] == ["mesh.tensor 4"]
    assert find_settings(SEARCH, "l4:1x2x4", no_report)[0] == ["mesh.tensor 4"]
