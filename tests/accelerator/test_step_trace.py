"""The summary of a trace, on kernels as an H100 names them, and on a real trace of a CPU."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).parent))
import step_trace
from step_trace import Kernel

# Names of kernels of a training step, and their kinds; an operation where the name says nothing.
NAMES = [
    ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "", "matrix_products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "", "matrix_products"),
    (
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256_32x3_tn>",
        "",
        "matrix_products",
    ),
    ("void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16>", "", "matrix_products"),
    ("gemm_fusion_dot_2193_0", "gemm_fusion_dot.2193", "matrix_products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "", "attention"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128>", "", "attention"),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "", "collectives"),
    ("MemcpyD2D", "copy.41", "copies_and_gathers"),
    ("loop_dynamic_update_slice_fusion_7", "", "copies_and_gathers"),
    ("input_transpose_fusion_3", "", "copies_and_gathers"),
    ("wrapped_gather", "", "copies_and_gathers"),
    ("loop_multiply_fusion_12", "", "elementwise_and_reductions"),
    ("input_add_reduce_fusion_1", "", "elementwise_and_reductions"),
    ("triton_softmax_5_0", "", "elementwise_and_reductions"),
    ("kernel_0", "fusion.9", "elementwise_and_reductions"),
    ("DeviceRadixSortOnesweepKernel", "sort.3", "other"),
]


@pytest.mark.parametrize("name, operation, kind", NAMES)
def test_kind(name, operation, kind):
    assert Kernel(name, 0, 1, operation).kind == kind


def test_shares_add_up():
    kernels = [
        Kernel("nvjet_tst_128x256", 0, 40),
        Kernel("loop_add_fusion_1", 40, 10),
        Kernel("loop_add_fusion_2", 60, 20),  # after 10 ns of idle time
        Kernel("MemcpyH2D", 70, 10),  # beside the last one, on another stream
        Kernel("strange", 90, 10),  # after 10 more
    ]
    summary = step_trace.summarize(kernels, top=2)
    assert summary["span_seconds"] == pytest.approx(100e-9)
    assert summary["idle_share"] == pytest.approx(20 / 110)
    assert summary["matrix_products_share"] == pytest.approx(40 / 110)
    assert summary["elementwise_and_reductions_share"] == pytest.approx(30 / 110)
    assert sum(value for key, value in summary.items() if key.endswith("_share")) == pytest.approx(1)
    assert [(k["kernel"], k["runs"]) for k in summary["longest"]] == [("nvjet_tst_128x256", 1), ("loop_add_fusion", 2)]
    assert summary["other"] == ["strange"]


def test_without_kernels():
    with pytest.raises(ValueError, match="no kernel"):
        step_trace.summarize([])


def test_real_trace(tmp_path):
    step = jax.jit(lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, 5)[0])
    x = jnp.ones((200, 200))
    step(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        step(x).block_until_ready()
    kernels = step_trace.read_kernels(tmp_path)
    assert sum(kernel.kind == "matrix_products" for kernel in kernels) >= 5
    assert not any(kernel.name.startswith("while") for kernel in kernels)
    summary = step_trace.summarize(kernels)
    assert summary["matrix_products_share"] > 0 and 0 <= summary["idle_share"] < 1
