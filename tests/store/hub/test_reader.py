import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.errors import InputError
from qstar_jax.sharding import make_mesh
from qstar_jax.store import hub
from qstar_jax.store.open import load_model, param_shardings


@pytest.fixture
def folder(hf_folder, tmp_path):
    """A copy of the tiny folder that a test may break."""
    return shutil.copytree(hf_folder, tmp_path / "model")


def read(folder, mesh):
    model = hub.read_model(folder)
    return hub.read_params(folder, model, param_shardings(model, mesh, MeshOptions(min_shard_size=64)))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensor(folder, one_device):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        read(folder, one_device)


def test_misshapen_tensor(folder, one_device):
    # The transposed weight has as many elements: only a check of the shape can find it.
    def transpose(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = np.ascontiguousarray(
            tensors["model.layers.0.mlp.up_proj.weight"].T
        )

    change_tensors(folder, transpose)
    with pytest.raises(InputError, match=r"up_proj\.weight' has shape \(32, 64\); expected \(64, 32\)"):
        read(folder, one_device)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(number, folder, one_device):
    change_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 5), number))
    with pytest.raises(InputError, match=r"'model\.layers\.\*\.mlp\.up_proj\.weight' holds .* not finite in float32"):
        read(folder, one_device)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "score.weight", "model.norm.bias"],
)
def test_tensors_without_a_place_are_named(name, folder, one_device):
    added = {name: np.zeros(32, np.float32), "zzz": np.zeros(1, np.float32)}
    change_tensors(folder, lambda tensors: tensors.update(added))
    with pytest.raises(InputError, match=rf"hold '{name}' and 1 more.*correct config\.json.*remove the tensors"):
        read(folder, one_device)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_computed_tensors_of_old_files_change_nothing(name, folder, one_device, tiny_params):
    change_tensors(folder, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, read(folder, one_device), tiny_params)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.float64, ml_dtypes.float8_e4m3fn, bool], ids=str)
def test_other_types_of_numbers_are_refused(kind, folder, one_device):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].astype(kind)}))
    with pytest.raises(InputError, match=rf"'{name}' has numbers of type .*expected F32, F16, BF16.*dequantize "):
        read(folder, one_device)


def set_tied(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def test_a_tied_unembedding_may_be_written_twice(folder, one_device):
    set_tied(folder)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert hub.read_model(folder).config.tie_word_embeddings and "unembed" not in read(folder, one_device)


def test_an_unembedding_of_its_own_goes_before_a_tie(
    folder, tiny_model, tiny_params, tiny_tokenizer, tmp_path, one_device
):
    set_tied(folder)
    model, params = hub.read_model(folder), read(folder, one_device)
    assert model == tiny_model
    jax.tree.map(np.testing.assert_array_equal, params, tiny_params)
    hub.write_folder(tmp_path / "again", model, params, tiny_tokenizer, "float32")
    assert hub.read_config(tmp_path / "again")["tie_word_embeddings"] is False


def test_two_sets_of_weights_are_refused(folder, one_device):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(InputError, match=r"holds model\.safetensors and model\.safetensors\.index\.json"):
        read(folder, one_device)


def test_a_tensor_in_two_files_is_refused(folder, one_device):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    shutil.copy(folder / "one.safetensors", folder / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"two\.safetensors: tensor '.*' is in another file"):
        read(folder, one_device)


def test_pickles_are_never_opened(folder, one_device):
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("a pickle was loaded",)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*never opened.*model\.safetensors"):
        read(folder, one_device)


def test_no_weights_at_all(folder, one_device):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        read(folder, one_device)


def test_index_that_names_an_absent_file(folder, one_device):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json: names missing files: model-00002-of-00002\.safetensors"):
        read(folder, one_device)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_index_that_is_none(folder, one_device, text):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json"):
        read(folder, one_device)


def test_corrupt_safetensors(folder, one_device):
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        read(folder, one_device)


def test_torn_safetensors(folder, one_device):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        read(folder, one_device)


def test_config_missing(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json.*found: .*model\.safetensors"):
        hub.read_config(folder)


@pytest.mark.parametrize("text", ["{'model_type': 'llama'}", "", "[1, 2]", '"llama"'])
def test_config_invalid(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        hub.read_config(folder)


@pytest.mark.parametrize("model", ["./not/there", "/not/there", "a/b/c", "...", "what is this"])
def test_neither_folder_nor_hub_name(model):
    with pytest.raises(InputError, match="expected a folder or a name on the Hub"):
        hub.open_folder(model)


def test_a_file_is_no_folder(folder):
    with pytest.raises(InputError, match="found: a file"):
        hub.open_folder(str(folder / "config.json"))


def test_the_hub_is_asked_for_safe_files_only(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.open_folder("owner/model") == tmp_path and asked["name"] == "owner/model"
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked["allow_patterns"])

    def fail(name, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"owner/model.*ConnectionError: no network"):
        hub.open_folder("owner/model")


def test_folder_without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="no usable tokenizer"):
        hub.read_tokenizer(folder)


def test_tokenizers_that_want_to_run_code_are_refused(folder, monkeypatch):
    (folder / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        hub.read_tokenizer(folder)  # what transformers knows of itself may be used instead
    except InputError as error:
        assert str(folder) in str(error)


class Spy:
    """Notes how many elements are read of each tensor, by each read."""

    def __init__(self, part, name, reads):
        self._part, self._name, self._reads = part, name, reads

    def get_shape(self):
        return self._part.get_shape()

    def get_dtype(self):
        return self._part.get_dtype()

    def __getitem__(self, index):
        value = self._part[index]
        self._reads.setdefault(self._name, []).append(value.size)
        return value


@pytest.fixture
def reads(monkeypatch):
    """Name of tensor -> sizes of the reads."""
    reads, real = {}, safetensors.safe_open

    class Spying:
        def __init__(self, *arguments, **options):
            self._file = real(*arguments, **options)

        def keys(self):
            return self._file.keys()

        def get_slice(self, name):
            return Spy(self._file.get_slice(name), name, reads)

        def get_tensor(self, name):
            raise AssertionError(f"{name} was read as a whole")

    monkeypatch.setattr(safetensors, "safe_open", Spying)
    return reads


@pytest.mark.parametrize(
    "options", [MeshOptions(data=1, fsdp=8), MeshOptions(data=1, fsdp=2, tensor=4)], ids=["fsdp", "tensor"]
)
def test_each_device_reads_its_own_slice_only(options, hf_folder, reads, one_device):
    params = read(hf_folder, make_mesh(options))
    sizes = {name: value.size for name, value in load_file(hf_folder / "model.safetensors").items()}
    assert reads.keys() == sizes.keys()
    for name in (name for name in sizes if "norm" not in name):  # norms are small, so they are replicated
        assert set(reads[name]) == {sizes[name] // 8}, name
        assert sum(reads[name]) == sizes[name], name  # nothing is read twice
    plain = read(hf_folder, one_device)
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_parameters_lie_where_they_are_asked_for(hf_folder):
    mesh = make_mesh(MeshOptions(data=2, fsdp=2, tensor=2))
    loaded = load_model(hf_folder, ComputeOptions(), mesh, MeshOptions(min_shard_size=64))
    up = loaded.params["layers"]["mlp"]["up"]["kernel"]
    assert up.shape == (2, 32, 64) and up.addressable_shards[0].data.shape == (2, 16, 32)
    assert loaded.description is None and loaded.reference is None and loaded.source == hf_folder


def test_values_equal_those_of_the_file(hf_folder, tiny_params):
    mesh = make_mesh(MeshOptions(data=2, fsdp=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, read(hf_folder, mesh), tiny_params)


def test_parameters_take_the_type_that_is_asked_for(hf_folder, tiny_params, one_device):
    loaded = load_model(hf_folder, ComputeOptions(param_dtype="bfloat16"), one_device, MeshOptions())
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype("bfloat16")}
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), loaded.params, expected)
