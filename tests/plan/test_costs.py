from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import ComputeOptions
from qstar_jax.decoding import SampleOptions, sample
from qstar_jax.plan.costs import Collective, collectives, kernels, memory_traffic, opaque_kernels, products
from qstar_jax.plan.hlo import Module

P = PartitionSpec


def shape(*sizes, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def compiled(function, *shapes) -> Module:
    return Module.parse(jax.jit(function).lower(*shapes).compile().as_text())


def total(module: Module) -> float:
    return sum(product.total for product in products(module))


@pytest.mark.parametrize(
    "equation, left, right, flops",
    [
        ("ij,jk->ik", (32, 64), (64, 16), 2 * 32 * 64 * 16),
        ("ji,jk->ik", (64, 32), (64, 16), 2 * 32 * 64 * 16),
        ("bij,bjk->bik", (4, 32, 64), (4, 64, 16), 2 * 4 * 32 * 64 * 16),
        ("bij,cij->bc", (4, 32, 64), (5, 32, 64), 2 * 4 * 5 * 32 * 64),
    ],
)
def test_products(equation, left, right, flops):
    assert total(compiled(lambda x, y: jnp.einsum(equation, x, y), shape(*left), shape(*right))) == flops


def test_a_scanned_product_and_its_gradient():
    def loss(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    weights, x = shape(6, 64, 64), shape(32, 64)
    once = 6 * 2 * 32 * 64 * 64
    assert total(compiled(loss, weights, x)) == once
    # Backward there are two products per layer; the gradient of the first input is not needed, but a loop cannot know.
    assert total(compiled(jax.grad(loss), weights, x)) == 3 * once


def test_convolutions_count_no_padding():
    def convolve(x, kernel):
        return jax.lax.conv(x, kernel, (1, 1), "SAME")

    taps = 32 * 3 - 2  # along an axis of 32, both ends lack one of three
    assert total(compiled(convolve, shape(8, 16, 32, 32), shape(24, 16, 3, 3))) == 2 * 8 * 24 * 16 * taps**2


def mesh_of(*sizes) -> Mesh:
    return jax.make_mesh(sizes, tuple("xy"[: len(sizes)]), axis_types=(AxisType.Auto,) * len(sizes))


# kind -> function of a shard, its specs, and the share of float32[64, 128] that is transferred, and sent on a ring
TRANSFERS = {
    "all-reduce": (lambda x: jax.lax.psum(x, "x"), P("x"), P(), 1 / 8, 1 / 8 * 2 * 7 / 8),
    "all-gather": (lambda x: jax.lax.all_gather(x, "x", tiled=True), P("x"), P(), 1, 7 / 8),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), P(), P("x"), 1, 7 / 8),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "x", 1, 0, tiled=True), P("x"), P("x"), 1 / 8, 1 / 8 * 7 / 8),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
        P("x"),
        P("x"),
        1 / 8,
        1 / 8,
    ),
}


@pytest.mark.parametrize("kind", TRANSFERS)
def test_transfers(kind):
    function, before, after, transferred, sent = TRANSFERS[kind]
    sharded = jax.shard_map(function, mesh=mesh_of(8), in_specs=before, out_specs=after, check_vma=False)
    (item,) = collectives(compiled(sharded, shape(64, 128)), 8)
    assert (item.kind, item.nbytes, item.runs) == (kind, 64 * 128 * 4 * transferred, 1)
    assert item.wire_bytes == pytest.approx(64 * 128 * 4 * sent)


def test_transfers_of_several_arrays_in_loops_and_groups():
    def shard(x, y):
        return jax.lax.scan(lambda carry, _: (jax.lax.psum(carry, "y"), None), (x, y), length=3)[0]

    mesh, spec = mesh_of(4, 2), P("x")
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    items = collectives(compiled(sharded, shape(64, 128), shape(8, 4)), 8)
    assert {(item.kind, item.group, item.runs) for item in items} == {("all-reduce", 2, 3)}
    nbytes = (16 * 128 + 2 * 4) * 4
    assert sum(item.nbytes for item in items) == nbytes
    assert sum(item.wire_bytes for item in items) == 3 * nbytes


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,4]<=[8]", 4),
        ("mesh['x'=4,'y'=2] {'y'}", 2),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", 4),
        ("mesh['x'=8] {'x':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_notations_of_groups(groups, size):
    text = f"""
ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %r = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}"""
    assert [item.group for item in collectives(Module.parse(text), 8)] == [size]


def on(device) -> NamedSharding:
    return NamedSharding(Mesh(np.array([device]), "x"), P())


@pytest.mark.parametrize("triton", [True, False])
def test_products_of_an_h100(devices_of, triton):
    # Triton's kernels, or calls of cuBLAS; on a card, the compiler tries which are faster.
    here = on(devices_of("h100:1x1x1")[0])
    x = shape(1024, 512, dtype=jnp.bfloat16, sharding=here)
    weights = shape(6, 512, 512, dtype=jnp.bfloat16, sharding=here)

    def program(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    lowered = jax.jit(program).lower(x, weights)
    module = Module.parse(lowered.compile({"xla_gpu_enable_triton_gemm": triton}).as_text())
    (product,) = products(module)
    assert (product.total, product.runs, product.dtype) == (6 * 2 * 1024 * 512 * 512, 6, "bf16")
    assert product.kind.startswith("dot" if triton else "__cublas$")
    assert sum(n for kind, n in kernels(module).items() if ("triton" if triton else "__cublas$") in kind) == 6
    assert not opaque_kernels(module)


def test_attention_of_an_h100(devices_of):
    here = on(devices_of("h100:1x1x1")[0])
    q, k = (shape(2, 512, heads, 64, dtype=jnp.bfloat16, sharding=here) for heads in (8, 2))

    def program(q, k):
        attend = lambda q, k: jax.nn.dot_product_attention(q, k, k, is_causal=True, implementation="cudnn")  # noqa: E731
        out, pull_back = jax.vjp(attend, q, k)
        return pull_back(out)

    flops = 2 * 64 * 2 * 8 * 512 * 512 / 2  # of one product over all scores, half of which are masked
    # Scores and outputs; backward the scores again, and the gradients of probabilities, queries, keys and values.
    assert [product.total for product in products(compiled(program, q, k))] == [2 * flops, 5 * flops]


def test_memory_traffic_of_an_h100(devices_of):
    here = on(devices_of("h100:1x1x1")[0])
    x = shape(1024, 512, sharding=here)
    nbytes = 1024 * 512 * 4
    assert memory_traffic(compiled(lambda x, y: jnp.tanh(x + y), x, x)) == 3 * nbytes
    assert memory_traffic(compiled(lambda x: jnp.tanh(x[:256]), x)) == nbytes / 2
    x, w = (shape(*sizes, dtype=jnp.bfloat16, sharding=here) for sizes in ((4096, 512), (512, 8192)))
    assert memory_traffic(compiled(lambda x, w: x @ w, x, w)) == 2 * (4096 * 512 + 512 * 8192 + 4096 * 8192)


def test_memory_traffic_of_a_loop_is_that_of_its_slices(devices_of):
    here = on(devices_of("h100:1x1x1")[0])
    stack, row = shape(64, 1024, 1024, sharding=here), 1024 * 1024 * 4

    def program(stack):
        return jax.lax.scan(lambda carry, x: (jnp.tanh(carry + x), carry), jnp.zeros_like(stack[0]), stack)

    # Each step reads a slice and the carry, and writes the carry, and the slice of a stack; before, zeros are written.
    traffic = memory_traffic(compiled(program, stack))
    assert 64 * 4 * row < traffic < 64 * 8 * row


def test_a_pallas_kernel_is_opaque():
    text = """
ENTRY %main (x: bf16[16]) -> bf16[16] {
  %x = bf16[16]{0} parameter(0)
  ROOT %r = bf16[16]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"a":1}
}"""
    module = Module.parse(text)
    assert opaque_kernels(module) == kernels(module) == {"tpu_custom_call": 1}
    assert products(module) == []


def test_a_device_alone_sends_nothing():
    module = compiled(lambda x: x + 1, shape(16))
    assert collectives(module, 1) == []
    assert Collective("all-reduce", module.computations[module.entry], 64, 1, 1.0, "").wire_bytes == 0


def test_decoding_on_an_h100_copies_no_layer_out_of_a_stack(devices_of, tiny_model):
    here, compute = on(devices_of("h100:1x1x1")[0]), ComputeOptions(param_dtype="bfloat16", dtype="bfloat16")
    model, tokens = replace(tiny_model, compute=compute), shape(2, 16, dtype=jnp.int32, sharding=here)
    traffic = {}
    for name, layout in (("stacked", lambda params: params), ("apart", model.unstack)):
        params = jax.tree.map(
            lambda x: shape(*x.shape, dtype=x.dtype, sharding=here), jax.eval_shape(layout, model.abstract_params())
        )
        lengths, options = shape(2, dtype=jnp.int32, sharding=here), SampleOptions(8, (), temperature=0.0)
        with jax.set_mesh(here.mesh):
            text = sample.lower(model, params, tokens, lengths, None, options).compile().as_text()
        traffic[name] = memory_traffic(Module.parse(text, unknown_trips=(8,)))
    assert traffic["apart"] < traffic["stacked"]


def test_memory_traffic_of_a_tpu_leaves_out_what_lies_in_its_core():
    module = Module.parse("""
ENTRY %main (x: f32[6,512]) -> f32[2,512] {
  %x = f32[6,512]{1,0:T(8,128)} parameter(0)
  %c = (f32[6,512]{1,0:T(8,128)S(1)}, f32[6,512]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %d = f32[6,512]{1,0:T(8,128)S(1)} copy-done(%c)
  %s = ((f32[6,512]{1,0:T(8,128)}), f32[2,512]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:512]}
  %e = f32[2,512]{1,0:T(8,128)S(1)} slice-done(%s)
  %n = f32[6,512]{1,0:T(8,128)S(1)} negate(%d)
  ROOT %r = f32[2,512]{1,0:T(8,128)} exponential(%e)
}""")
    row = 4 * 512
    copied, sliced, written, counter = 6 * row, 2 * row, 2 * row, 4
    assert memory_traffic(module) == copied + sliced + written + counter


def test_memory_traffic_of_a_slice_within_nested_fusions_is_that_of_the_slice():
    module = Module.parse("""
%slice (stack.1: bf16[16,8,128], i.1: s32[]) -> bf16[8,128] {
  %stack.1 = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %part = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack.1, %i.1, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %flat = bf16[8,128]{1,0:T(8,128)(2,1)} bitcast(%part)
}

%product (i.2: s32[], stack.2: bf16[16,8,128], x.2: bf16[4,8]) -> bf16[4,128] {
  %i.2 = s32[]{:T(128)} parameter(0)
  %stack.2 = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %x.2 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %weights = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%stack.2, %i.2), kind=kLoop, calls=%slice
  ROOT %y = bf16[4,128]{1,0:T(8,128)(2,1)} convolution(%x.2, %weights), dim_labels=bf_io->bf
}

ENTRY %main (i: s32[], stack: bf16[16,8,128], x: bf16[4,8]) -> bf16[4,128] {
  %i = s32[]{:T(128)} parameter(0)
  %stack = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  ROOT %r = bf16[4,128]{1,0:T(8,128)(2,1)} fusion(%i, %stack, %x), kind=kOutput, calls=%product
}""")
    weights, written, index = 2 * 8 * 128, 2 * 4 * 128, 4
    assert memory_traffic(module) == weights + written + index
