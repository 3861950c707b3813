import jax
import numpy as np
import pytest

from qstar_jax.config import ComputeOptions, DecodeOptions, MeshOptions
from qstar_jax.decoding import (
    BeamOptions,
    ChunkOptions,
    Rejection,
    SampleOptions,
    beam_search,
    best_of_n,
    chunk_beam_search,
    sample,
)
from qstar_jax.decoding.objectives import ImplicitReward, Likelihood, LogitArithmetic
from qstar_jax.decoding.options import interpret
from qstar_jax.decoding.policies import Ensemble
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.plan.decode import lower_search, search_flops, search_stages, search_trips
from qstar_jax.plan.step import CompiledProgram
from qstar_jax.sharding import make_mesh

KEYS = jax.random.split(jax.random.key(0), 2)
REWARD, NUCLEUS = ImplicitReward(1.0), {"top_p": 0.9, "temperature": 0.7}
# name -> (the block, the call that it stands for, in which only the models are left out)
SEARCHES = {
    "greedy": ({}, lambda *inputs: sample.lower(*inputs, None, SampleOptions(8, (), temperature=0.0))),
    "sample": (
        {"method": "sample", "return_sequences": 3, **NUCLEUS},
        lambda *inputs: sample.lower(*inputs, KEYS, SampleOptions(8, (), num_samples=3, **NUCLEUS)),
    ),
    "beam": ({"method": "beam", "beams": 3}, lambda *inputs: beam_search.lower(*inputs, BeamOptions(3, 8, ()))),
    "stochastic beam": (
        {"method": "beam", "stochastic": True},
        lambda model, params, prompts, lengths: beam_search.lower(
            model, params, prompts[:1], lengths[:1], BeamOptions(4, 8, (), stochastic=True), key=KEYS[0]
        ),
    ),
    "best of N": (
        {"method": "best_of_n", "num_samples": 4, "rejection_interval": 3},
        lambda *inputs: best_of_n.lower(
            *inputs, KEYS, SampleOptions(8, (), num_samples=4), objective=REWARD, rejection=Rejection(3, 0.5)
        ),
    ),
    "chunk": (
        {"method": "chunk", "beams": 2, "samples": 2, "chunk_length": 4},
        lambda *inputs: chunk_beam_search.lower(
            *inputs, KEYS, ChunkOptions(8, (), beams=2, samples=2, chunk_length=4), objective=Likelihood()
        ),
    ),
}


def block(**options):
    return interpret(DecodeOptions(**{"max_new_tokens": 8} | options))


@pytest.mark.parametrize("name", SEARCHES)
def test_it_is_the_search_of_the_verb(name, tiny_model, tiny_params, one_device):
    options, call = SEARCHES[name]
    models = [tiny_model] * (2 if options.get("method") == "best_of_n" else 1)
    params = tiny_model.unstack(tiny_params)
    policy = (Ensemble(tuple(models)), (params, params)) if len(models) > 1 else (tiny_model, params)
    with jax.set_mesh(one_device):
        real = call(*policy, np.ones((2, 64), np.int32), np.array([50, 9], np.int32))
    planned = lower_search(models, block(**options), 2, 50, one_device)  # prompts are padded to 64 tokens
    costs = [CompiledProgram(lowered.compile(), 1, planned.unknown_trips) for lowered in (planned.lowered, real)]
    assert costs[0].flops == costs[1].flops and costs[0].kernels == costs[1].kernels
    assert costs[0].memory["temporary"] == costs[1].memory["temporary"]
    # Every loop over tokens has its trips, in the right order: the products are those of a search by hand.
    unknown = [loop for loop in costs[0].module.loops if loop.trips is None]
    assert len(unknown) == len(planned.unknown_trips)
    sequences = sum(count * (end - start) for count, start, end in by_hand(name))
    prompts = 1 if name == "stochastic beam" else 2
    forward = tiny_model.config.forward_flops
    layers = forward(tokens=prompts * (64 + sequences), scored_tokens=prompts * (1 + sequences), context=0)
    scores = costs[0].flops["f32"] - len(models) * layers
    assert 0 < scores < 0.5 * costs[0].flops["f32"]


def by_hand(name):
    """(sequences, first and last number of tokens) of the stages; the beams' last token is run, but not needed."""
    return {
        "greedy": [(1, 1, 8)],
        "sample": [(3, 1, 8)],
        "beam": [(3, 0, 8)],
        "stochastic beam": [(4, 0, 8)],
        "best of N": [(4, 1, 3), (2, 3, 6), (1, 6, 8)],
        "chunk": [(4, 0, 8)],  # two chunks of four
    }[name]


def test_pairs_of_models_run_beside_the_policy(tiny_model, one_device):
    plan = interpret(DecodeOptions(max_new_tokens=8), pairs=1)
    alone = lower_search([tiny_model], block(), 2, 16, one_device)
    guided = lower_search([tiny_model] * 3, plan, 2, 16, one_device, weights=[0.5])
    assert guided.flops == 3 * alone.flops and guided.tokens == alone.tokens == 16
    programs = [CompiledProgram(x.lowered.compile(), 1, x.unknown_trips) for x in (alone, guided)]
    assert programs[1].flops["f32"] == 3 * programs[0].flops["f32"]
    assert isinstance(plan.objective(weights=[0.5]), LogitArithmetic)


def test_trips_and_stages():
    assert search_trips(block(max_new_tokens=128)) == (127,)
    assert search_trips(block(max_new_tokens=128, method="beam")) == (32,)  # blocks of four steps
    assert search_trips(block(max_new_tokens=50, method="chunk")) == (4, 16)
    samples = {"method": "best_of_n", "num_samples": 16, "max_new_tokens": 128}
    rejecting = block(**samples, rejection_interval=32)
    assert search_trips(block(**samples)) == (127,) and search_trips(rejecting) == (31, 32, 32, 32)
    assert search_stages(rejecting) == [(16, 32), (8, 64), (4, 96), (2, 128)]


def test_model_flops_by_hand(tiny_model):
    forward = tiny_model.config.forward_flops
    # Three of four tokens are read again, each of which sees the prompt, itself and those before it.
    expected = forward(tokens=10, scored_tokens=2, context=3) + sum(
        forward(tokens=6, scored_tokens=6, context=5 + own) for own in (1, 2, 3)
    )
    assert search_flops(tiny_model, 2, 5, [(3, 4)]) == pytest.approx(expected)
    assert search_flops(tiny_model, 2, 5, [(3, 2), (3, 4)]) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["mcts", "exact"])
def test_searches_whose_programs_depend_on_answers_are_refused(method, tiny_model, one_device):
    with pytest.raises(InputError, match=rf"decode.method {method} is not planned.* greedy, sample, beam"):
        lower_search([tiny_model], block(method=method), 2, 16, one_device)


@pytest.mark.parametrize("topology", ["h100:1x1x2", "v5e:2x2"])
def test_searches_on_hardware_that_is_not_there(topology, devices_of, tiny_config):
    model = CausalLM.from_hf(tiny_config, ComputeOptions(param_dtype="bfloat16", dtype="bfloat16"))
    mesh_options = MeshOptions(data=1, tensor=2, min_shard_size=64)
    mesh = make_mesh(mesh_options, devices_of(topology)[:2])
    search = lower_search([model], block(method="beam", beams=3), 2, 16, mesh, mesh_options)
    program = CompiledProgram(search.lowered.compile(), 2, search.unknown_trips)
    unknown = [loop for loop in program.module.loops if loop.trips is None]
    assert len(unknown) == 1 and program.memory["total"] > 0 and program.wire_bytes
    assert sum(program.flops.values()) > sum(CompiledProgram(program.compiled, 2).flops.values())
