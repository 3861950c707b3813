import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qstar_jax import sharding
from qstar_jax.config import MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.sharding import constrain_batch, make_mesh, parameter_spec, tree_shardings
from qstar_jax.store.open import param_shardings

AXES = {"data": 1, "fsdp": 2, "tensor": 2}


def spec(path, shape, axes=AXES, **options):
    return parameter_spec(path, shape, axes, **{"min_shard_size": 0, **options})


def test_tensor_takes_the_largest_divisible_dimension_and_fsdp_the_next():
    assert spec("embed/embedding", (60, 32)) == P("tensor", "fsdp")
    assert spec("unembed/embedding", (32, 60)) == P("fsdp", "tensor")
    assert spec("some/kernel", (8, 6, 4)) == P("tensor", "fsdp", None)


def test_dimensions_that_an_axis_does_not_divide_are_passed_over():
    assert spec("embed/embedding", (61, 32)) == P(None, "tensor")
    assert spec("embed/embedding", (60, 31)) == P("tensor", None)
    assert spec("embed/embedding", (61, 31)) == P(None, None)
    axes = {"data": 1, "fsdp": 3, "tensor": 4}
    assert spec("embed/embedding", (60, 32), axes) == P("tensor", None)  # 3 does not divide 32


def test_equal_dimensions_are_taken_from_the_last_to_the_first():
    assert spec("layers/attention/q/kernel", (2, 32, 32)) == P(None, "fsdp", "tensor")


def test_axes_of_one_device_cut_nothing():
    assert spec("embed/embedding", (60, 32), {"data": 8, "fsdp": 1, "tensor": 1}) == P(None, None)
    assert spec("embed/embedding", (60, 32), {"data": 1, "fsdp": 4, "tensor": 1}) == P("fsdp", None)


def test_the_axis_of_stacked_layers_is_never_cut():
    assert spec("layers/mlp/up/kernel", (64, 4, 8)) == P(None, "fsdp", "tensor")
    assert spec("layers/norm/scale", (64, 7)) == P(None, None)
    # An optimizer's moments carry their parameter's path inside their own.
    assert spec("0/mu/layers/mlp/up/kernel", (64, 4, 8)) == P(None, "fsdp", "tensor")
    # "layers/" must be a whole name.
    assert spec("my_layers/kernel", (64, 4)) == P("tensor", "fsdp")


def test_small_arrays_are_replicated():
    assert spec("embed/embedding", (60, 32), min_shard_size=60 * 32 + 1) == P()
    assert spec("embed/embedding", (60, 32), min_shard_size=60 * 32) == P("tensor", "fsdp")
    assert parameter_spec("norm/scale", (32,), AXES) == P()  # by default


@pytest.mark.parametrize("ids_spec", [P(), sharding.BATCH], ids=["replicated ids", "sharded ids"])
def test_vectors_of_a_sharded_table_reach_the_batch_without_being_replicated(ids_spec, capfd):
    rng, mesh = np.random.default_rng(0), make_mesh(MeshOptions(data=2, fsdp=2, tensor=2))
    table = rng.normal(size=(64, 32)).astype(np.float32)
    ids = rng.integers(0, 64, (8, 4)).astype(np.int32)

    def compiled(look_up):
        vectors = jax.jit(lambda table, ids: look_up(lambda ids: jnp.take(table, ids, axis=0), ids))
        specs = (table, P("tensor", "fsdp")), (ids, ids_spec)
        arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in specs]
        program = vectors.lower(*arrays).compile()
        np.testing.assert_array_equal(program(*arrays), table[ids])
        return program.as_text(), capfd.readouterr().err

    with jax.set_mesh(mesh):
        text, warnings = compiled(sharding.look_up)
        assert "all-to-all" in text and not re.search(r"= f32[^=]* all-gather", text)
        assert "rematerialization" not in warnings
        text, _ = compiled(lambda table, ids: constrain_batch(table(ids)))  # in one step
        assert re.search(r"= f32[^=]* all-gather", text)


@pytest.mark.parametrize("lora", [False, True])
def test_a_mesh_of_three_axes_computes_the_same(lora):
    config = {"model_type": "llama", "num_attention_heads": 4, "vocab_size": 96, "num_hidden_layers": 1}
    model = CausalLM.from_hf(config | {"hidden_size": 64, "intermediate_size": 96})
    model = model.with_lora(8, 16.0) if lora else model
    params = jax.tree.map(lambda x: x + 0.05, model.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (4, 24), 0, 96)  # a row for each device that has rows of its own
    gradients = jax.jit(jax.grad(lambda params: jax.nn.log_softmax(model.logits(params, tokens))[..., 7].mean()))
    options = MeshOptions(data=2, fsdp=2, tensor=2, min_shard_size=0)
    mesh = make_mesh(options)
    with jax.set_mesh(mesh):
        actual = gradients(jax.device_put(params, param_shardings(model, mesh, options)))
    for ours, expected in zip(jax.tree.leaves(actual), jax.tree.leaves(gradients(params)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-7)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_layers_are_gathered_from_where_their_parameters_lie(sizes, monkeypatch):
    shape = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}  # wider than the model
    model = CausalLM.from_hf({"model_type": "qwen3"} | shape | heads).with_lora(8, 16.0)
    options, seen = MeshOptions(**{"data": 1} | sizes), []

    def record(function, params, *arrays, specs=None):
        seen.append(specs)
        return sharding.map_batch(function, params, *arrays, specs=specs)

    def by_path(tree):
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, P))
        return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): x for path, x in leaves}

    monkeypatch.setattr("qstar_jax.models.decoder.map_batch", record)
    mesh, tokens = make_mesh(options), jax.ShapeDtypeStruct((8, 16), jnp.int32)
    with jax.set_mesh(mesh):
        jax.eval_shape(model.logits, model.abstract_params(), tokens)
    lie = jax.tree.map(lambda x: P(*x.spec[1:]), param_shardings(model, mesh, options)["layers"])
    (specs,) = (specs[0] for specs in seen if specs)
    assert by_path(specs) == by_path(lie)


def test_overrides_win_and_the_first_match_counts():
    overrides = {"embed/": ["fsdp", None], "embed": [None, "tensor"]}
    assert spec("embed/embedding", (60, 32), overrides=overrides) == P("fsdp", None)
    assert spec("unembed", (60, 32), overrides=overrides) == P(None, "tensor")
    assert spec("other", (60, 32), overrides=overrides) == P("tensor", "fsdp")
    assert spec("embed/embedding", (60, 32), overrides=overrides, min_shard_size=10**9) == P("fsdp", None)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (["fsdp"], (60, 32)),
        (["fsdp", None, None], (60, 32)),
        (["model", None], (60, 32)),
        ([None, "fsdp"], (60, 31)),
        (["fsdp", "fsdp"], (60, 32)),
    ],
    ids=["too few", "too many", "unknown axis", "does not divide", "one axis twice"],
)
def test_bad_overrides_name_pattern_and_path(axes, shape):
    with pytest.raises(InputError, match=r"'emb\.d'.*embed/embedding of shape \(60, 3"):
        spec("embed/embedding", shape, overrides={"emb.d": axes})


def test_a_pattern_that_is_no_regular_expression_is_named():
    with pytest.raises(InputError, match=r"\(embed"):
        spec("embed/embedding", (60, 32), overrides={"(embed": [None, None]})


def test_the_user_overrides_win_over_those_of_the_family():
    mesh = make_mesh(MeshOptions(data=2, fsdp=2, tensor=2))
    tree = {"layers": {"attention": {"o": {"kernel": jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)}}}}
    family = {r"layers/attention/o/kernel$": (None, "tensor", "fsdp")}

    def cut(**overrides):
        shardings = tree_shardings(tree, mesh, MeshOptions(overrides=overrides), family)
        return shardings["layers"]["attention"]["o"]["kernel"].spec

    assert cut() == P(None, "tensor", "fsdp")
    assert cut(**{"o/kernel": [None, None, "tensor"]}) == P(None, None, "tensor")
    # The family's own pattern, copied and changed, is the likeliest thing that a user writes.
    assert cut(**{r"layers/attention/o/kernel$": [None, "fsdp", None]}) == P(None, "fsdp", None)


def test_family_overrides_that_do_not_fit_the_mesh_give_way_to_the_rule():
    # Nobody asked for the family's override, so a mesh that cannot have it must not be refused because of it.
    mesh = make_mesh(MeshOptions(data=1, fsdp=8))
    tree = {"layers": {"attention": {"o": {"kernel": jax.ShapeDtypeStruct((2, 32, 36), jnp.float32)}}}}
    family = {r"layers/attention/o/kernel$": (None, "tensor", "fsdp")}
    shardings = tree_shardings(tree, mesh, MeshOptions(min_shard_size=0), family)
    assert shardings["layers"]["attention"]["o"]["kernel"].spec == P(None, "fsdp", None)


def test_trees_of_parameters_and_moments_are_cut_alike():
    import optax

    mesh = make_mesh(MeshOptions(data=2, fsdp=4))
    params = {"embed": {"embedding": jnp.ones((60, 32))}, "norm": {"scale": jnp.ones(32)}}
    options = MeshOptions(min_shard_size=64)
    cut = tree_shardings(params, mesh, options)
    assert cut["embed"]["embedding"].spec == P("fsdp", None) and cut["norm"]["scale"].spec == P()
    moments = tree_shardings(jax.eval_shape(optax.adamw(1e-3).init, params), mesh, options)
    assert moments[0].mu == cut and moments[0].nu == cut
    assert moments[0].count.spec == P()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (MeshOptions(), (8, 1, 1)),
        (MeshOptions(data=2, fsdp=-1), (2, 4, 1)),
        (MeshOptions(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (MeshOptions(data=1, fsdp=1, tensor=8), (1, 1, 8)),
    ],
)
def test_mesh_shapes(options, expected):
    mesh = make_mesh(options)
    assert tuple(mesh.shape.values()) == expected and mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    "options",
    [
        MeshOptions(data=3),
        MeshOptions(data=4),
        MeshOptions(data=-1, fsdp=3),
        MeshOptions(data=-1, fsdp=-1),
        MeshOptions(data=0),
        MeshOptions(data=-1, fsdp=0),
        MeshOptions(data=-2, fsdp=-4),
        MeshOptions(data=16),
    ],
)
def test_meshes_that_do_not_fit_are_refused(options):
    with pytest.raises(InputError, match=rf"mesh data={options.data}, fsdp={options.fsdp}.*8 device"):
        make_mesh(options)


def device(number: int, slice_index: int, platform: str):
    """A stand-in: virtual devices belong to no slice."""
    names = {"id": number, "slice_index": slice_index, "platform": platform, "device_kind": platform}
    return type("Device", (), names)()


def ids(mesh):
    return [[d.id for d in row.flat] for row in mesh.devices]


def test_data_extends_over_hosts_of_gpus_and_the_rest_stays_inside():
    hosts = [device(number, number % 2, "gpu") for number in range(8)]  # in no order that helps
    expected = [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert ids(make_mesh(MeshOptions(data=4, fsdp=2), hosts)) == expected
    assert ids(make_mesh(MeshOptions(data=4, tensor=2), hosts)) == expected
    # One host has no room for eight.
    assert ids(make_mesh(MeshOptions(data=1, fsdp=8), hosts)) == [list(range(8))]
    uneven = [device(number, int(number > 2), "gpu") for number in range(8)]
    assert ids(make_mesh(MeshOptions(data=4, fsdp=2), uneven)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("options", [MeshOptions(data=1, fsdp=-1), MeshOptions(data=3, tensor=4)])
def test_parameters_that_would_travel_between_slices_of_tpus_are_refused(options):
    tpus = [device(number, number // 6, "tpu") for number in range(12)]
    with pytest.raises(InputError, match=r"mesh data=[13], .* 2 slices of 6 TPUs.* --mesh.data a multiple of 2$"):
        make_mesh(options, tpus)


def test_some_of_the_devices():
    assert make_mesh(MeshOptions(data=2), devices=jax.devices()[2:4]).devices.size == 2


def test_activations_are_cut_by_rows_inside_a_mesh_only():
    x = jnp.arange(32.0).reshape(8, 4)
    np.testing.assert_array_equal(jax.jit(constrain_batch)(x), x)
    mesh = make_mesh(MeshOptions(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        y = jax.jit(constrain_batch)(x)
    assert y.sharding.shard_shape(y.shape) == (1, 4)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_float32_means_float32_on_every_platform(platform, one_device, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)

    def precision(dtype):
        with sharding.use_mesh(one_device, dtype):
            jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda x: (x @ x).sum()))(jnp.ones((2, 2), dtype))
            return {str(e.params["precision"]) for e in jaxpr.eqns if e.primitive.name == "dot_general"}

    assert precision("bfloat16") == {"None"}
    with jax.default_matmul_precision("tensorfloat32"):  # what a caller has chosen stays
        assert precision("bfloat16") == {"(Precision.HIGH, Precision.HIGH)"}
    assert precision("float32") == ({"None"} if platform == "cpu" else {"(Precision.HIGHEST, Precision.HIGHEST)"})


@pytest.mark.parametrize(
    ("environment", "given"),
    [
        ({}, {}),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {}),
        ({"CUDA_VISIBLE_DEVICES": ""}, {}),
        ({"CUDA_VISIBLE_DEVICES": "3", "JAX_LOCAL_DEVICE_IDS": "1"}, {}),
        ({"CUDA_VISIBLE_DEVICES": "3", "JAX_PROCESS_ID": "3"}, {"local_device_ids": [0], "process_id": 3}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8e1f"}, {"local_device_ids": [0]}),
    ],
)
def test_a_process_that_sees_one_gpu_takes_that(environment, given, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **more: calls.append(more))
    sharding.join_processes(MeshOptions(multi_process=True, join_timeout=900))
    sharding.join_processes(MeshOptions())
    assert calls == [{"initialization_timeout": 900, "heartbeat_timeout_seconds": 30} | given]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SLURM_STEP_NUM_TASKS", "8", "Slurm has started 8 processes"),
        ("OMPI_COMM_WORLD_SIZE", "2", "Open MPI has started 2 processes"),
        ("TPU_WORKER_HOSTNAMES", "10.0.0.1,10.0.0.2", "a TPU pod has started 2 processes"),
        ("MEGASCALE_NUM_SLICES", "4", "over slices of TPUs has started 4 processes"),
    ],
)
def test_one_of_several_processes_does_not_train_on_its_own(name, value, says, monkeypatch):
    monkeypatch.setenv(name, "localhost" if name.endswith("HOSTNAMES") else "1")
    sharding.join_processes(MeshOptions())
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"{says} \({name}=.*add --mesh.multi_process true"):
        sharding.join_processes(MeshOptions())


def test_a_process_that_is_alone_joins_nobody(monkeypatch):
    def refuse(**_):
        raise ValueError("coordinator_address should be defined.")  # as JAX does where it finds no cluster

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(InputError, match=r"multi_process true: .* set JAX_COORDINATOR_ADDRESS"):
        sharding.join_processes(MeshOptions(multi_process=True))
    with pytest.raises(InputError, match="join_timeout 0: expected at least 1 second"):
        sharding.join_processes(MeshOptions(join_timeout=0))
