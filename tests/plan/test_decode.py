import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.config import MeshOptions
from qstar_jax.decoding import BeamOptions, SampleOptions, beam_search, sample
from qstar_jax.plan.decode import lower_search, search_trips
from qstar_jax.plan.step import CompiledProgram
from qstar_jax.sharding import make_mesh


@pytest.mark.parametrize(
    "options", [BeamOptions(3, 8, ()), SampleOptions(8, (), temperature=0.0), SampleOptions(8, ())]
)
def test_it_is_the_search_of_a_model(options, tiny_model, tiny_params, one_device):
    params, prompts, lengths = tiny_model.unstack(tiny_params), np.ones((2, 16), np.int32), np.array([16, 9], np.int32)
    with jax.set_mesh(one_device):
        if isinstance(options, BeamOptions):
            real = beam_search.lower(tiny_model, params, prompts, lengths, options)
        else:
            keys = jax.random.split(jax.random.key(0), 2) if options.temperature else None
            real = sample.lower(tiny_model, params, prompts, lengths, keys, options)
    planned = lower_search(tiny_model, (2, 16), options, one_device)
    costs = [CompiledProgram(lowered.compile(), 1, search_trips(options)) for lowered in (planned, real)]
    assert costs[0].flops == costs[1].flops and costs[0].kernels == costs[1].kernels
    assert costs[0].memory == costs[1].memory


def test_trips():
    assert search_trips(SampleOptions(128, ())) == 128
    assert search_trips(BeamOptions(5, 128, ())) == 32  # blocks of four steps


def test_searches_on_hardware_that_is_not_there(devices_of, tiny_model):
    options = BeamOptions(3, 8, ())
    for topology in ("h100:1x1x2", "v5e:2x2"):
        mesh_options = MeshOptions(data=1, tensor=2, min_shard_size=64)
        mesh = make_mesh(mesh_options, devices_of(topology)[:2])
        program = CompiledProgram(lower_search(tiny_model, (2, 16), options, mesh, mesh_options).compile(), 2)
        assert program.wire_bytes and program.flops
        assert program.memory["total"] > 0 and jnp.isfinite(program.traffic)
