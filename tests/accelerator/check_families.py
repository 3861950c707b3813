"""A tiny model of each family on the accelerator and on the CPU: training, scoring and decoding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from sides import accelerator, cpu, distance, place
from tiny_families import FAMILIES

from qstar_jax.config import ComputeOptions, Dtype, OptimizerOptions
from qstar_jax.data.batches import Batch, make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.decoding.sampler import sample
from qstar_jax.decoding.sampling import SampleOptions
from qstar_jax.decoding.search.beam import beam_search
from qstar_jax.decoding.search.beam_options import BeamOptions
from qstar_jax.losses import make_loss
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.scoring import score_tokens
from qstar_jax.sharding import platform, use_mesh
from qstar_jax.training.objectives import preference_loss_fn
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.step import TrainState, make_train_step

NAMES = """
    llama qwen3 gemma2 mistral gemma3 qwen2_window phi3 gpt2 olmo2 smollm3 gpt_neox gemma llama3_tied llama_biases
    qwen2 phi3_long smollm3_window llama_yarn
""".split()
# Between them: windows, caps, learned and rotary positions, biases, shared keys.
TINY_NAMES = "gemma2 gpt2".split()
# In float32, two orders of summation differ by some 1e-6. Products in TF32, which GPUs take by default where this
# library asks for float32, differ by 3e-4 or more.
FLOAT32_BOUND = 5e-5
# What bfloat16 loses depends on the model, as random layers amplify rounding: on the accelerator it may lose twice what
# it loses on the CPU, where products are exact before they are rounded, and the 1e-2 of a few roundings.
BFLOAT16_FACTOR, BFLOAT16_BOUND = 2.0, 1e-2
# With AdamW's usual eps, the signs of gradients that are only rounding would decide its first step.
OPTIMIZER = OptimizerOptions(learning_rate=1.0, eps=1.0, max_grad_norm=0.0, weight_decay=0.01, schedule="constant")
LOSS = make_loss(beta=0.5)
EOS_IDS, NEW_TOKENS = (2,), 12


def tiny_model(name: str, dtype: Dtype, attention: str) -> CausalLM:
    """A model of `FAMILIES`; where it has longrope, for texts of 3 to 40 tokens."""
    model = CausalLM.from_hf(FAMILIES[name].config, ComputeOptions(dtype=dtype, attention=attention))
    if (context := model.config.longrope_context) is not None:
        longrope = "short" if context >= 40 else "long"
        model = replace(model, compute=replace(model.compute, longrope=longrope))
    return model


def random_params(model: CausalLM) -> Params:
    """Random numpy parameters. Norms and biases are random too, so that none can be left out or swapped."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        noise = rng.normal(size=x.shape).astype(np.float32)
        return 1 + 0.4 * noise if jax.tree_util.keystr(path).endswith("scale']") else 0.2 * noise

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def random_batch() -> Batch:
    """Six pairs of many lengths, packed into sequences of 40 slots, and two empty examples."""
    rng = np.random.default_rng(1)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(3, 60, rng.integers(low, high + 1)).astype(np.int32)

    examples = [
        Example(ids(1, 8), False, (Response(ids(1, 8), False), Response(ids(1, 8), False)), i) for i in range(6)
    ]
    shapes = Shapes.of(examples, batch_size=8, row_length=40, multiple=4, texts=True)
    return make_batch(examples, shapes, fill_to=8)


def train_and_score(model: CausalLM, params: Params, batch: Batch, mesh: Mesh) -> dict[str, Any]:
    """Loss, token rewards, gradient, and what one step changes, by the program that trains."""
    optimizer = make_optimizer(OPTIMIZER, 10)
    train_step = make_train_step(preference_loss_fn(model, LOSS), optimizer)

    @jax.jit
    def run(params: Params, batch: Batch):
        ref_params = jax.tree.map(lambda x: 1.05 * x + 0.01, params)
        state = TrainState(jnp.int32(0), params, optimizer.init(params), ref_params)
        after, metrics = train_step(state, batch)
        rewards = score_tokens(model, params, ref_params, batch).rewards(LOSS.beta)
        moved = jax.tree.map(jnp.subtract, after.params, params)
        # The first moment is a tenth of the gradient after one step.
        gradient = optax.tree.get(after.opt_state, "mu")
        loss = metrics["loss"][0] / metrics["loss"][1]
        return {"loss": loss, "rewards": rewards, "gradient": gradient, "step": moved}

    with use_mesh(mesh, model.compute.dtype):
        return jax.device_get(run(*place((params, batch), mesh)))


def decode(model: CausalLM, params: Params, mesh: Mesh) -> dict[str, Any]:
    """Greedy responses, beams and samples."""
    lengths = np.array([3, 7, 12], np.int32)
    prompts = np.random.default_rng(2).integers(3, 60, (3, 12), dtype=np.int32)
    keys = jax.random.split(jax.random.key(3), 3)
    sampling = SampleOptions(NEW_TOKENS, EOS_IDS, num_samples=4, temperature=0.9, top_k=40, top_p=0.95)

    @jax.jit
    def run(params: Params, prompts, lengths, keys):
        # In the layout in which the platform decodes.
        params = model.unstack(params) if platform() == "cpu" else params
        common = model, params, prompts, lengths
        return {
            "greedy": sample(*common, None, SampleOptions(NEW_TOKENS, EOS_IDS, temperature=0.0)),
            "beams": beam_search(*common, BeamOptions(5, NEW_TOKENS, EOS_IDS)),
            "samples": sample(*common, keys, sampling),
        }

    with use_mesh(mesh, model.compute.dtype):
        return jax.device_get(run(*place((params, prompts, lengths, keys), mesh)))


def check_family(name: str, change: Callable[[Params], Params] = lambda params: params) -> dict[str, Any]:
    """Compares the accelerator, with the attention that it takes by itself, with dense attention on the CPU.

    Args:
        name: One of `FAMILIES`.
        change: Changes the accelerator's parameters, to see that this is found.

    Returns:
        A record of the distances.
    """
    exact = tiny_model(name, "float32", "dense")
    params, batch = random_params(exact), random_batch()
    expected = train_and_score(exact, params, batch, cpu())
    record, errors = {"name": f"family {name}"}, []

    def compare(label: str, found: float, bound: float):
        record[label] = found
        if not found <= bound:
            errors.append(f"{label} {found:.2g}, more than {bound:g}")

    actual = train_and_score(tiny_model(name, "float32", "auto"), change(params), batch, accelerator())
    for key in expected:
        compare(f"float32_{key}", distance(actual[key], expected[key]), FLOAT32_BOUND)
    rounded = tiny_model(name, "bfloat16", "auto")
    on_cpu = train_and_score(rounded, params, batch, cpu())
    actual = train_and_score(rounded, change(params), batch, accelerator())
    for key in expected:
        bound = BFLOAT16_FACTOR * distance(on_cpu[key], expected[key]) + BFLOAT16_BOUND
        compare(f"bfloat16_{key}", distance(actual[key], expected[key]), bound)
    actual = decode(tiny_model(name, "float32", "auto"), change(params), accelerator())
    for key, responses in decode(exact, params, cpu()).items():
        same = np.array_equal(actual[key].tokens, responses.tokens)
        scores = distance([actual[key].logp, actual[key].score], [responses.logp, responses.score])
        compare(f"float32_{key}", scores if same else float("inf"), FLOAT32_BOUND)
    return record | {"ok": not errors} | ({"error": "; ".join(errors)} if errors else {})
