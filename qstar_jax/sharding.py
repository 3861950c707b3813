"""The device mesh (data, fsdp, tensor), and one short rule that shards every parameter over it."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import Dtype, MeshOptions
from qstar_jax.console import shorten_middle
from qstar_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
# Shards the batch dimension. In the order (data, fsdp), XLA (jax 0.10.2 and 0.12) moves examples to the wrong devices
# when all three axes are larger than 1: wrong numbers, and no error.
BATCH = PartitionSpec(("fsdp", "data"))
_SMALL = 2**24  # bytes of what is gathered along rings
GATHERED = "gathered"  # checkpoint name of the matrices that `map_batch` gathers


# Who starts several processes -> the variable that counts them.
_LAUNCHERS = {
    "Slurm": "SLURM_STEP_NUM_TASKS",
    "Open MPI": "OMPI_COMM_WORLD_SIZE",
    "a launcher": "JAX_NUM_PROCESSES",
    "a TPU pod": "TPU_WORKER_HOSTNAMES",
    "a job over slices of TPUs": "MEGASCALE_NUM_SLICES",
}
_HEARTBEAT_SECONDS = 30  # without a sign of life of a process, after which JAX ends the others


def join_processes(options: MeshOptions):
    """Joins the other processes of the job if `options.multi_process` is set; call it before any other JAX function.

    If one of them ends before the job does, JAX ends the others within a minute.

    Raises:
        InputError: If this is one of several processes and the option is not set, or it is, and this is none.
        RuntimeError: If the others did not come in time.
    """
    if options.join_timeout < 1:
        raise InputError(f"--mesh.join_timeout {options.join_timeout}: expected at least 1 second")
    if not options.multi_process:
        _refuse_partners()
        return
    # JAX itself reads the coordinator's address, and detects on a cluster whatever is not set here.
    settings = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    given: dict[str, Any] = {name: int(value) for name, value in settings.items() if value is not None}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible and "," not in visible and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # A launcher has bound one GPU. Under Slurm, JAX would look for the one with this process's number on the node,
        # which is not visible (jax-ml/jax#28194).
        given["local_device_ids"] = [0]
    given |= {"initialization_timeout": options.join_timeout, "heartbeat_timeout_seconds": _HEARTBEAT_SECONDS}
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        raise InputError(
            f"--mesh.multi_process true: {error} Neither Slurm, Open MPI, Kubernetes nor a TPU pod was recognized; set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _refuse_partners():
    for launcher, name in _LAUNCHERS.items():
        value = os.environ.get(name, "")
        count = len(value.split(",")) if name.endswith("HOSTNAMES") else int(value) if value.isdigit() else 1
        if count > 1:
            raise InputError(
                f"{launcher} has started {count} processes ({name}={shorten_middle(value, 80)}), and each would train "
                "on its own and write the same folder; add --mesh.multi_process true, or start one process only"
            )


def make_mesh(options: MeshOptions = MeshOptions(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices as a (data, fsdp, tensor) mesh of Auto axes.

    The network between slices of TPUs, and between hosts of GPUs, is slow. So `data` extends over them, along which
    only gradients travel, once a step; `fsdp` and `tensor` stay inside. Hosts of GPUs whose number does not divide
    `data` are arranged in their order.

    Args:
        options: Sizes of the axes; one of them may be -1, to take all remaining devices.
        devices: Devices to arrange; all by default.

    Raises:
        InputError: If the sizes do not multiply to the number of devices, or a slice of TPUs does not hold `fsdp` and
            `tensor`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(options, len(devices))
    return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(options: MeshOptions, devices: int) -> tuple[int, ...]:
    """Returns the sizes of the axes of a mesh.

    Args:
        options: Sizes of the axes; one of them may be -1, to take all remaining devices.
        devices: Number of devices.

    Raises:
        InputError: If the sizes do not multiply to it.
    """
    sizes = [options.data, options.fsdp, options.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and fixed > 0 and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    if min(sizes) < 1 or math.prod(sizes) != devices:
        raise InputError(
            f"mesh data={options.data}, fsdp={options.fsdp}, tensor={options.tensor} does not fit {devices} "
            "device(s): the sizes must be positive and multiply to that number (one may be -1: the remaining devices)"
        )
    return tuple(sizes)


def slice_sizes(devices: Sequence[jax.Device]) -> list[int]:
    """Returns the number of devices of each slice of TPUs, or host of GPUs: JAX numbers both in one attribute."""
    return list(Counter(getattr(device, "slice_index", 0) for device in devices).values())


def _arrange(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    (data, fsdp, tensor), slices = sizes, slice_sizes(devices)
    fits = data % len(slices) == 0 and len(set(slices)) == 1
    if len(slices) > 1 and fits:
        inside, outside = [data // len(slices), fsdp, tensor], [len(slices), 1, 1]
        return create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)
    if len(slices) > 1 and devices[0].platform == "tpu":
        raise InputError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(slices)} slices of "
            f"{', '.join(map(str, sorted(set(slices))))} TPUs: in every layer, parameters would travel over the slow "
            f"network between slices; expected slices of one size, and --mesh.data a multiple of {len(slices)}"
        )
    # Neighbours on the network become neighbours in the mesh, the last axes first.
    return create_device_mesh(sizes, devices, allow_split_physical_axes=True)


@contextmanager
def use_mesh(mesh: Mesh, dtype: Dtype) -> Iterator[None]:
    """Enters a mesh, where the matrix products of `compute.dtype` float32 are float32 ones.

    By default, JAX rounds their operands: to TF32 (10 bits of mantissa) on NVIDIA GPUs, and to bfloat16 on TPUs.
    """
    with jax.set_mesh(mesh):
        precise = dtype == "float32" and platform() != "cpu"
        with jax.default_matmul_precision("float32") if precise else nullcontext():
            yield


def platform() -> str:
    """Returns the platform for which programs are traced, "cpu", "gpu" or "tpu": that of the mesh, if one is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def parameter_spec(
    path: str,
    shape: Sequence[int],
    axis_sizes: Mapping[str, int],
    *,
    min_shard_size: int = MeshOptions.min_shard_size,
    overrides: Mapping[str, Sequence[str | None]] | None = None,
    hints: Mapping[str, Sequence[str | None]] | None = None,
) -> PartitionSpec:
    """Decides how to shard one array: `tensor` shards its largest divisible dimension, `fsdp` the next largest.

    Arrays under a `layers/` path have the stacked layers in dimension 0, which is scanned over and never sharded.

    Args:
        path: Names joined by "/", such as "layers/mlp/up/kernel".
        shape: Shape of the array.
        axis_sizes: Size of each mesh axis.
        min_shard_size: Arrays with fewer elements are replicated.
        overrides: Regular expression searched in `path` -> an axis name or None per dimension; the first match wins.
        hints: The same from the model family: after `overrides`, and ignored where the mesh does not divide the array.

    Returns:
        The specification; among dimensions of equal size, the last comes first.

    Raises:
        InputError: If an override is not a regular expression, has the wrong number of dimensions, names an unknown
            axis or one axis twice, or does not divide its dimension.
    """
    # What the user asks for must fit; the hints of the model family may not.
    for pattern, axes in (overrides or {}).items():
        if len(shape) > 0 and _matches(pattern, path):
            if not _fits(axes, shape, axis_sizes):
                raise InputError(
                    f"mesh.overrides {pattern!r}: {list(axes)} does not fit {path} of shape {tuple(shape)}; expected "
                    f"one of {', '.join(axis_sizes)} (each at most once) or null per dimension, whose size the axis "
                    f"must divide ({dict(axis_sizes)})"
                )
            return PartitionSpec(*axes)
    for pattern, axes in (hints or {}).items():
        if _matches(pattern, path) and _fits(axes, shape, axis_sizes):
            return PartitionSpec(*axes)
    # Sharding a small array costs more communication than it saves memory.
    if math.prod(shape) < min_shard_size:
        return PartitionSpec()
    # Give each axis the largest dimension that is still free and divisible by it.
    spec: list[str | None] = [None] * len(shape)
    first = 1 if re.search(r"(^|/)layers/", path) else 0
    for axis in ("tensor", "fsdp"):
        size = axis_sizes[axis]
        free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % size == 0]
        if size > 1 and free:
            spec[max(free, key=lambda i: (shape[i], i))] = axis
    return PartitionSpec(*spec)


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise InputError(f"mesh.overrides {pattern!r}: not a regular expression ({error})") from error


def _fits(axes: Sequence[str | None], shape: Sequence[int], axis_sizes: Mapping[str, int]) -> bool:
    names = [axis for axis in axes if axis is not None]
    if len(axes) != len(shape) or len(set(names)) != len(names) or not set(names) <= set(axis_sizes):
        return False
    return all(axis is None or dim % axis_sizes[axis] == 0 for axis, dim in zip(axes, shape, strict=True))


def tree_shardings(tree, mesh: Mesh, options: MeshOptions = MeshOptions(), family_overrides=None):
    """Applies `parameter_spec` to a tree: parameters, gradients, or the state of an optimizer.

    The paths of an optimizer's moments contain those of their parameters, so moments are sharded like them.

    Args:
        tree: Arrays or `jax.ShapeDtypeStruct`s.
        mesh: The mesh.
        options: `min_shard_size` and the user's overrides.
        family_overrides: Hints of the model family; the user's overrides take precedence.
    """

    def leaf_sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = parameter_spec(
            name,
            leaf.shape,
            mesh.shape,
            min_shard_size=options.min_shard_size,
            overrides=options.overrides,
            hints=family_overrides,
        )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Shards the first dimension of an activation over the batch axes; does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "data" not in mesh.axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def look_up(table: Callable[[jax.Array], jax.Array], ids: jax.Array) -> jax.Array:
    """Looks up vectors in a table that is sharded as `parameter_spec` says, and shards the batch of them.

    They leave the table with their features over `fsdp`. Where the batch goes over both `fsdp` and `data`, and `tensor`
    shards the table too, XLA (jax 0.10.2) knows no way from one to the other, and has every device hold all vectors
    ("involuntary full rematerialization"); so they go an axis at a time.

    Args:
        table: Function from ids [B, S] to vectors [B, S, D].
        ids: Ids [B, S].
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if min(sizes.get(axis, 1) for axis in AXES) == 1:
        return constrain_batch(table(ids))
    constrain = jax.lax.with_sharding_constraint
    vectors = table(constrain(ids, PartitionSpec()))
    if vectors.shape[-1] % sizes["fsdp"] == 0:
        vectors = constrain(constrain(vectors, PartitionSpec(None, None, "fsdp")), PartitionSpec("fsdp"))
    return constrain_batch(vectors)


def batch_shards() -> int:
    """Returns the number of devices over which the mesh shards a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)


def free_axes(*axes: str) -> tuple[str, ...]:
    """Returns those of some axes of the mesh over which the compiler distributes: in `map_batch`, not the batch's."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in axes if kinds.get(axis) == AxisType.Auto)


def axes_size(axes: Sequence[str]) -> int:
    """Returns the number of devices along some axes of the mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def map_batch(function: Callable[..., Any], params: Any, *arrays: Any, specs: Any = None) -> Any:
    """Computes function(params, *arrays) on each shard of the batch, with whole parameters.

    What travels between devices are the parameters, gathered over `fsdp`, and their gradients, scattered again: nothing
    that grows with the batch. Left to itself, the compiler may instead gather activations, or gather a matrix anew for
    every product. The axis `tensor` is left to the compiler.

    Args:
        function: Treats the items of the batch independently.
        params: Tree of arrays.
        *arrays: Trees of arrays whose first dimension is the batch, or a multiple of it.
        specs: How the parameters are sharded; by default, as `parameter_spec` says of arrays without a path.

    Returns:
        Arrays whose first dimension is the batch. Without a mesh, or with one that does not divide the batch, the
        function is called with everything.
    """
    mesh, shards = jax.sharding.get_abstract_mesh(), batch_shards()
    if shards == 1 or any(x.shape[0] % shards for x in jax.tree.leaves(arrays)):
        return function(params, *arrays)
    if specs is None:
        # Sharding them as the rule does is free; otherwise the compiler would move them first.
        specs = jax.tree.map(lambda x: parameter_spec("", x.shape, mesh.shape), params)
    specs = jax.tree.map(_fsdp_only, specs)

    def on_shard(params: Any, *arrays: Any) -> Any:
        return function(jax.tree.map(_gather_shards, params, specs), *arrays)

    axes = {axis for axis in AXES if axis != "tensor" or mesh.shape[axis] == 1}
    batch = (BATCH,) * len(arrays)
    return jax.shard_map(on_shard, in_specs=(specs, *batch), out_specs=BATCH, axis_names=axes, check_vma=False)(
        params, *arrays
    )


def layer_specs(layer: Any, layers: int, hints: Mapping[str, Sequence[str | None]]) -> Any:
    """Returns how a layer of a stack is sharded, for `map_batch`.

    Args:
        layer: Tree of the parameters of one layer, without the axis over layers.
        layers: Number of layers in the stack.
        hints: As for `parameter_spec`.
    """
    axis_sizes = jax.sharding.get_abstract_mesh().shape

    def spec(path, x: jax.Array) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        stacked = parameter_spec(f"layers/{name}", (layers, *x.shape), axis_sizes, hints=hints)
        return PartitionSpec(*stacked[1:])

    return jax.tree_util.tree_map_with_path(spec, layer) if axis_sizes else None


def _fsdp_only(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(axis if axis == "fsdp" else None for axis in spec))


def _gather_shards(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return checkpoint_name(_gather(x, spec.index("fsdp")), GATHERED) if "fsdp" in spec else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, dimension: int) -> jax.Array:
    """Gathers an array over `fsdp`; its gradient is summed and scattered again."""
    columns, rows = _rings()
    is_small = x.nbytes * jax.lax.axis_size("fsdp") < _SMALL
    x = jnp.moveaxis(x, dimension, 0)
    for rings in (rows, columns) if is_small else (None,):
        x = jax.lax.all_gather(x, "fsdp", axis_index_groups=rings, tiled=True)
    return jnp.moveaxis(x, 0, dimension)


def _sum_and_scatter(dimension: int, _: None, x_bar: jax.Array) -> tuple[jax.Array]:
    x_bar = jnp.moveaxis(x_bar, dimension, 0)
    for rings in _rings():
        x_bar = jax.lax.psum_scatter(x_bar, "fsdp", axis_index_groups=rings, tiled=True)
    return (jnp.moveaxis(x_bar, 0, dimension),)


_gather.defvjp(lambda x, dimension: (_gather(x, dimension), None), _sum_and_scatter)


def _rings() -> tuple[list[list[int]], list[list[int]]]:
    """Arranges the devices along `fsdp` in a grid, as a TPU's are; elsewhere, in one row.

    XLA's compiler for TPUs (libtpu 0.0.42) scatters sums along a ring, and gathers small arrays along one; over a whole
    grid, it makes the sum of whole arrays on every device instead, which sends twice as much. It also wants the first
    dimension.

    Returns:
        The columns, and the rows.
    """
    size = jax.lax.axis_size("fsdp")
    rows = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0) if platform() == "tpu" else 1
    grid = np.arange(size).reshape(rows, -1)
    return grid.T.tolist(), grid.tolist()
