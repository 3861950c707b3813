"""Each implementation of attention that the accelerator has, against dense attention in float32 on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from sides import accelerator, cpu, distance, place

from qstar_jax.config import Dtype
from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.models.attention import masked_attention
from qstar_jax.models.masks import PackedMask
from qstar_jax.sharding import use_mesh

# In float32 only sums are in another order. In bfloat16 an operand is off by up to 2^-9 = 2e-3, and weights, their
# gradients and the results are rounded; the expected values are those of the same, rounded operands.
BOUNDS = {"float32": 5e-5, "bfloat16": 1e-2}
SOFTCAP, HEADS, GROUPS = 30.0, 8, 2


@dataclass(frozen=True)
class Case:
    """Shapes of a check.

    Attributes:
        width: Of a head.
        length: Slots of a sequence.
        window: The window that is tried besides none.
        prompt: Longest prompt.
        response: Longest response.
    """

    width: int
    length: int
    window: int
    prompt: int
    response: int


CASES = (Case(64, 1024, 200, 384, 96), Case(128, 1024, 100, 64, 448))
TINY_CASES = (Case(16, 128, 20, 40, 24),)


def options() -> dict[str, tuple[Dtype, ...]]:
    """Implementations that the default backend has, and their dtypes; dense on a CPU is what others compare with."""
    both = ("float32", "bfloat16")
    kernels = {"cpu": {}, "gpu": {"dense": both, "cudnn": ("bfloat16",)}, "tpu": {"dense": both, "flash": both}}
    return {"blockwise": both, **kernels[jax.default_backend()]}


@cache
def packed(case: Case) -> tuple[PackedMask, Any]:
    """Mask and positions of sequences that pack pairs, several where they fit."""
    rng = np.random.default_rng(0)

    def ids(longest: int) -> np.ndarray:
        return np.zeros(rng.integers(longest // 4, longest + 1), np.int32)

    examples = [
        Example(ids(case.prompt), False, tuple(Response(ids(case.response), False) for _ in range(2)), row)
        for row in range(4)
    ]
    batch = make_batch(examples, Shapes.of(examples, batch_size=4, row_length=case.length, texts=True))
    return PackedMask(batch.blocks, batch.branches, batch.texts), batch.positions


@cache
def operands(case: Case) -> tuple[np.ndarray, ...]:
    """Queries, keys, values and outputs' gradients, rounded to bfloat16; the last two are 0 at padding."""
    rng, blocks = np.random.default_rng(1), packed(case)[0].blocks
    arrays = [rng.normal(size=(*blocks.shape, heads, case.width)) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in arrays]
    in_text = (blocks >= 0)[..., None, None]
    return *arrays[:2], *(x * in_text for x in arrays[2:])


@partial(jax.jit, static_argnums=(0, 1, 2))
def forward_and_backward(option, window, softcap, mask, positions, q, k, v, slope):
    """Outputs, and the gradients of q, k and v where those of the outputs are `slope`."""
    attend = masked_attention(mask, positions, option, scale=q.shape[-1] ** -0.5, softcap=softcap, windows=(window,))
    out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, window=window), q, k, v)
    return out, *pull_back(slope)


def run(option: str, case: Case, window: int | None, softcap: float | None, dtype: Dtype, mesh: Mesh, arrays=None):
    """Runs `forward_and_backward` on a mesh, with `arrays` or those of the case."""
    arrays = [jnp.asarray(x, dtype) for x in (operands(case) if arrays is None else arrays)]
    with use_mesh(mesh, dtype):
        results = forward_and_backward(option, window, softcap, *place((*packed(case), *arrays), mesh))
    return jax.tree.map(np.asarray, jax.device_get(results))


def settings(option: str, case: Case) -> list[tuple[int | None, float | None]]:
    """Windows and caps of an implementation; cuDNN has no caps."""
    caps = (None,) if option == "cudnn" else (None, SOFTCAP)
    return [(window, softcap) for window in (None, case.window) for softcap in caps]


expected = cache(lambda case, *setting: run("dense", case, *setting, "float32", cpu()))


def check_attention(option: str, dtype: Dtype, case: Case) -> dict[str, Any]:
    """Compares outputs and gradients of an implementation with and without windows and caps; a record."""
    forward = backward = 0.0
    for setting in settings(option, case):
        actual = run(option, case, *setting, dtype, accelerator())
        exact = expected(case, *setting)
        forward = max(forward, distance(actual[:1], exact[:1]))
        backward = max(backward, distance(actual[1:], exact[1:]))
    record = {"name": f"attention {option} {dtype} {case.width}", "forward": forward, "backward": backward}
    ok = max(forward, backward) <= BOUNDS[dtype]
    return record | {"ok": ok} | ({} if ok else {"error": f"more than {BOUNDS[dtype]:g}"})


def check_unseen(option: str, dtype: Dtype, case: Case) -> dict[str, Any]:
    """Changes tokens, and sees that only what may see them changes, by a bit; then the same of gradients; a record."""
    mask, _ = packed(case)
    visible, in_text = np.asarray(PackedMask(mask.blocks, mask.branches).dense()), mask.blocks >= 0
    q, k, v, slope = operands(case)
    before = run(option, case, None, None, dtype, accelerator())[0]
    errors = []
    for slot in representatives(mask):
        new_k, new_v = k.copy(), v.copy()
        new_k[:, slot] += 1
        new_v[:, slot] = 7 - 3 * v[:, slot]
        after = run(option, case, None, None, dtype, accelerator(), (q, new_k, new_v, slope))[0]
        changed = (before != after).any((2, 3))
        sees = visible[:, :, slot] & in_text
        if (changed & in_text & ~sees).any():
            errors.append(f"token {slot} reaches tokens that must not see it")
        if not changed[:, slot][in_text[:, slot]].all():
            errors.append(f"token {slot} does not reach itself")
    # If only the second response to the last prompt has a gradient, so have only it and its prompt.
    block = (mask.blocks >= 0) & (mask.blocks == mask.blocks.max(1, keepdims=True))
    second, may_have = block & (mask.branches == 2), block & (mask.branches != 1)
    gradients = run(option, case, None, None, dtype, accelerator(), (q, k, v, slope * second[..., None, None]))[1:]
    for name, gradient in zip("qkv", gradients, strict=True):
        if gradient[~may_have].any():
            errors.append(f"the gradient of {name} reaches other texts")
        if not gradient[second].any():
            errors.append(f"the gradient of {name} is zero")
    record = {"name": f"unseen tokens {option} {dtype} {case.width}", "ok": not errors}
    return record | ({"error": "; ".join(errors)} if errors else {})


def representatives(mask: PackedMask) -> Sequence[int]:
    """Slots in the prompt and in both responses of the first and of the last block of the first sequence."""
    blocks, branches = mask.blocks[0], mask.branches[0]
    parts = [(blocks == block) & (branches == branch) for block in (0, blocks.max()) for branch in (0, 1, 2)]
    return sorted({int(np.flatnonzero(part)[count // 2]) for part in parts if (count := part.sum())})
