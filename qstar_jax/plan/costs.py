"""What a compiled program costs: matrix products, traffic between devices, kernels. All figures are of one device."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qstar_jax.plan.hlo import Array, Instruction, Module

_COLLECTIVES = (
    "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
)
_GEMM, _CONVOLUTION, _ATTENTION = "__cublas$", "__cudnn$conv", "__cudnn$fmha"
# Instructions that launch nothing: they name, index or order what others have made.
_FREE = frozenset(
    "parameter constant bitcast tuple get-tuple-element after-all partition-id opt-barrier add-dependency "
    "async-update".split()
)


@dataclass(frozen=True)
class Product:
    """A matrix product, or what a kernel of attention multiplies.

    Attributes:
        flops: Floating-point operations of one run, a multiply-add counted as two.
        runs: How often it runs per call of the program.
        dtype: Dtype of its left operand.
        kind: What computes it: dot, convolution, or the target of a custom call.
        source: The JAX operation that it came from.
    """

    flops: float
    runs: float
    dtype: str
    kind: str
    source: str

    @property
    def total(self) -> float:
        """FLOPs of all runs."""
        return self.flops * self.runs


def products(module: Module) -> list[Product]:
    """Lists all matrix products; see `opaque_kernels` for what may hide more."""
    found = []
    for computation, x, runs in module.instructions("dot|convolution|custom-call"):
        flops = _flops(x, module.operands(computation, x))
        if flops is not None:
            dtype = module.operands(computation, x)[0].dtype
            found.append(Product(flops, runs, dtype, x.target or x.opcode, x.source))
    return found


def opaque_kernels(module: Module) -> Counter[str]:
    """Counts the runs of kernels whose products are unknown, such as those written in Pallas, by target."""
    counts = Counter()
    for computation, x, runs in module.instructions("custom-call"):
        if _flops(x, module.operands(computation, x)) is None:
            counts[x.target] += runs
    return counts


def _flops(x: Instruction, operands: list[Array]) -> float | None:
    """FLOPs of one run; None if this is no product, or nothing is known about it."""
    if x.opcode == "dot":
        contracted = x.numbers(r"lhs_contracting_dims=\{([\d,]*)\}")
    elif x.target.startswith(_GEMM):
        dimensions = x.config["gemm_backend_config"]["dot_dimension_numbers"]
        contracted = [int(i) for i in dimensions["lhs_contracting_dimensions"]]
    elif x.opcode == "convolution" or x.target == f"{_CONVOLUTION}Forward":
        return 2.0 * x.results[0].size * _convolution_depth(x, *operands[:2])
    elif x.target.startswith(_ATTENTION):
        return _attention_flops(x, operands[0])
    else:
        return None
    return 2.0 * x.results[0].size * math.prod(operands[0].shape[i] for i in contracted)


def _attention_flops(x: Instruction, queries: Array) -> float:
    """FLOPs of cuDNN's attention: 2 products forward, and 5 backward, where the scores are computed again.

    Causal attention is counted at half of the scores, which is what the kernels compute of long rows; what lengths and
    windows save is not known.
    """
    config = x.config["cudnn_fmha_backend_config"]
    scores = math.prod(int(size) for size in config["intermediate_tensor_shape"]["dimensions"])
    products_of_scores = 5 if "Backward" in x.target else 2
    return 2.0 * scores * queries.shape[-1] * products_of_scores * (0.5 if "CAUSAL" in config["mask_type"] else 1.0)


def _convolution_depth(x: Instruction, inputs: Array, kernel: Array) -> float:
    """Mean number of products behind an output. Products with padding are none: TPUs write matrix products so."""
    labels = [x.find(rf"dim_labels={pattern}") for pattern in (r"(\w+)_", r"\w+_(\w+)->", r"\w+->(\w+)")]
    depth = float(kernel.shape[labels[1].index("i")])
    fields = dict(pair.split("=") for pair in (x.find(r"window=\{([^}]*)\}") or "").split())
    for axis in filter(str.isdigit, labels[1]):
        sizes = [
            array.shape[text.index(axis)] for array, text in zip((inputs, kernel, x.results[0]), labels, strict=True)
        ]
        axis_fields = {name: value.split("x")[int(axis)] for name, value in fields.items()}
        depth *= _mean_taps(*sizes, axis_fields)
    return depth


def _mean_taps(length: int, window: int, outputs: int, fields: dict[str, str]) -> float:
    """Mean number of window entries that meet an input, along one dimension."""
    stride, dilation, spread = (int(fields.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    before = int(fields.get("pad", "0_0").split("_")[0])
    places = [o * stride - before + w * dilation for o in range(outputs) for w in range(window)]
    return sum(0 <= place <= (length - 1) * spread and place % spread == 0 for place in places) / max(outputs, 1)


@dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, ...
        array: The largest array that is gathered, reduced, scattered, exchanged or sent.
        nbytes: Bytes of all of them, in one run.
        group: Devices that take part, in each group.
        runs: How often it runs per call of the program.
        source: The JAX operation that it came from.
    """

    kind: str
    array: Array
    nbytes: int
    group: int
    runs: float
    source: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in all runs, with ring algorithms."""
        share = (self.group - 1) / self.group
        shares = {"all-gather": share, "reduce-scatter": share, "all-to-all": share, "all-reduce": 2 * share}
        return self.nbytes * shares.get(self.kind, 1.0) * self.runs


def collectives(module: Module, devices: int) -> list[Collective]:
    """Lists all transfers between the devices of a program, also those that run beside other work."""
    found = []
    continued = _continuations(module)
    for computation, x, runs in module.instructions(f"(?:{_COLLECTIVES})(?:-start)?"):
        if computation in continued:
            continue
        kind = x.opcode.removesuffix("-start")
        # A TPU's reduce-scatter is a fusion of that name around an all-reduce.
        kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind
        group = _group_size(x, devices)
        arrays = module.operands(computation, x)[: 1 if kind == "ragged-all-to-all" else None]
        if kind == "all-gather":
            (axis,) = x.numbers(r"dimensions=\{(\d+)\}")
            arrays = [
                Array(a.dtype, tuple(n * group if i == axis else n for i, n in enumerate(a.shape))) for a in arrays
            ]
        largest = max(arrays, key=lambda a: a.nbytes)
        found.append(Collective(kind, largest, sum(a.nbytes for a in arrays), group, runs, x.source))
    return found


def _continuations(module: Module) -> set[str]:
    """Names the computations that go on with a transfer which began elsewhere.

    On TPUs, a transfer beside other work appears where it starts, in fusions that carry it along, and where it ends.
    """
    ends = [x for _, x, _ in module.instructions("fusion") if x.name.startswith("async-collective-done")]
    carriers = (name for name in module.computations if name.startswith("async_collective_fusion"))
    return {*carriers, *(callee for x in ends for _, callee in x.callees)}


def _group_size(x: Instruction, devices: int) -> int:
    if sizes := x.find(r"replica_groups=mesh\[([^\]]*)\]"):  # mesh['data'=2,'fsdp'=4] {'fsdp'}
        axes = x.find(r"replica_groups=mesh\[[^\]]*\](?:, device_ids=\S+)? \{([^}]*)\}").replace("'", "").split(",")
        by_axis = dict(pair.split("=") for pair in sizes.replace("'", "").replace(" ", "").split(","))
        # A part of an axis is written 'name:(devices before it)devices of the part'.
        return math.prod(int(axis.rpartition(")")[2] if ":(" in axis else by_axis[axis.strip()]) for axis in axes)
    if iota := x.numbers(r"replica_groups=\[([\d,]+)\]<="):  # [groups,devices of a group]<=[...]
        return iota[-1]
    return len(x.numbers(r"replica_groups=\{\{([\d,]*)\}")) or devices  # {{0,1},{2,3}}, or {}: all


def kernels(module: Module) -> Counter[str]:
    """Counts what a GPU launches per call, by kind: products, cuDNN's kernels, fusions, copies, ..."""
    counts = Counter()
    for _, x, runs in _launched(module):
        counts[_kernel_kind(x)] += runs
    return counts


def memory_traffic(module: Module) -> float:
    """Counts the bytes that kernels of a GPU read and write per call, if no cache holds what one leaves for another."""
    return sum(runs * _traffic(module, name, x) for name, x, runs in _launched(module))


def _launched(module: Module) -> Iterator[tuple[str, Instruction, float]]:
    """Yields (computation, instruction, runs) of what is launched as kernels."""
    pending = [module.entry]
    while pending:
        name = pending.pop()
        for x in module.computations[name].values():
            # Other computations lie within one kernel.
            if x.opcode in ("while", "conditional", "call", "async-start"):
                pending += [callee for _, callee in x.callees]
            elif x.opcode not in _FREE and not x.opcode.endswith("-done"):
                yield name, x, module.runs[name]


def _traffic(module: Module, computation: str, x: Instruction) -> int:
    """Bytes that one run of a kernel reads and writes; of an array that it slices or updates, only that part."""
    if x.opcode == "copy-start":  # returns its target and its source
        return sum(array.memory_bytes for array in x.results)
    if x.opcode == "slice-start":  # between a TPU's memory and its core
        return x.results[1].nbytes + x.results[1].memory_bytes
    if x.opcode != "fusion":
        inside = module.computations[computation]
        reads = sum(_read_bytes(module, name, [x], inside) for name in dict.fromkeys(x.operands) if name in inside)
        return reads + _written_bytes(x, inside)
    inside = _fused(module, x)
    reads = sum(_parameter_bytes(module, name, inside) for name, y in inside.items() if y.opcode == "parameter")
    return reads + _written_bytes(list(inside.values())[-1], inside)


def _fused(module: Module, fusion: Instruction) -> Mapping[str, Instruction]:
    ((_, callee),) = fusion.callees
    return module.computations[callee]


def _parameter_bytes(module: Module, name: str, inside: Mapping[str, Instruction]) -> int:
    return _read_bytes(module, name, [y for y in inside.values() if name in y.operands], inside)


def _read_bytes(module: Module, name: str, users: list[Instruction], inside: Mapping[str, Instruction]) -> int:
    whole = sum(array.memory_bytes for array in inside[name].results)
    return min(whole, sum(_part_bytes(module, name, user, whole) for user in users))


def _part_bytes(module: Module, name: str, user: Instruction, whole: int) -> int:
    """Bytes that a user reads of an array."""
    if user.opcode == "fusion":  # within a fusion, on TPUs
        inside = _fused(module, user)
        indices = {y.numbers(r"^\((\d+)\)")[0]: parameter for parameter, y in inside.items() if y.opcode == "parameter"}
        used = [i for i, operand in enumerate(user.operands) if operand == name]
        return sum(_parameter_bytes(module, indices[i], inside) for i in used)
    if user.operands.index(name) == 0 and user.operands.count(name) == 1:
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            return sum(array.memory_bytes for array in user.results)
        if user.opcode == "dynamic-update-slice":
            return 0
    return whole


def _written_bytes(root: Instruction, inside: Mapping[str, Instruction]) -> int:
    if root.opcode == "dynamic-update-slice":  # in place
        return sum(array.memory_bytes for array in inside[root.operands[1]].results)
    if root.opcode in ("bitcast", "tuple"):
        return sum(_written_bytes(inside[name], inside) for name in root.operands)
    return sum(array.memory_bytes for array in root.results)


def _kernel_kind(x: Instruction) -> str:
    if x.opcode == "custom-call":
        return x.target
    if x.opcode != "fusion":
        return x.opcode
    inner = x.config.get("fusion_backend_config", {}).get("kind", "")
    return inner.strip("_") or x.find(r"kind=k(\w+)").lower() + " fusion"
