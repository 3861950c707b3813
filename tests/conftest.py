"""Eight virtual devices, shapes checked while tests run, and a tiny model that every floor shares."""

# ruff: noqa: E402 (the environment must be set before the imports)

import os
import sys
from importlib.metadata import version

# Before anything imports jax: sharding is tested in process, on eight virtual CPU devices.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On tiny models torch's threads spend longer waiting for each other than working.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compilation dominates test time, and optimized code gains nothing on arrays this small.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
if version("jax").startswith("0.10."):  # the older code generator compiles twice as fast; jax 0.12 dropped it
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # see `kept_programs`
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import gc
import importlib.util
import json
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import Tokenizer, models, pre_tokenizers

# Compilation creates many long-lived objects; collecting garbage after every 700 new ones would be wasted time.
gc.set_threshold(100_000)

# Tests check the shapes and dtypes in the signatures of pure functions at every call. Numpy arrays pass too: tests copy
# results to the host.
jaxtyping.Array = jax.Array | np.ndarray
CHECKED = ("mdp", "shaping", "tabular", "diffusion", "losses", "models.logprobs", "scoring", "decoding")
jaxtyping.install_import_hook([f"qstar_jax.{name}" for name in CHECKED], "beartype.beartype")

from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.data.batches import make_batch
from qstar_jax.data.packing import Shapes
from qstar_jax.data.tokenization import Example, Response
from qstar_jax.errors import InputError
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.models import CausalLM
from qstar_jax.plan.topology import topology_devices
from qstar_jax.sharding import make_mesh
from qstar_jax.store import hub
from qstar_jax.store.open import param_shardings


@pytest.hookimpl(tryfirst=True)  # before the plugin that starts the processes
def pytest_cmdline_main(config):
    """Runs folders on all cores (at most eight) and single files in this process, unless `-n` says otherwise.

    Work stealing keeps neighbouring tests together, so few module fixtures are built twice.
    """
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return  # a worker must not start workers
    option, cores = config.option, min(os.cpu_count() or 1, 8)
    if option.numprocesses is None and not option.usepdb and any(Path(arg).is_dir() for arg in config.args):
        option.numprocesses = cores if cores > 1 else None
    if option.numprocesses and option.dist == "no":
        option.dist = "worksteal"


def load_helper(path: str):
    """Imports a file of tests/ that holds no tests."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parent / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their own module
    spec.loader.exec_module(module)
    return module


tiny_families = load_helper("tiny_families.py")


def pytest_generate_tests(metafunc):
    """Runs a test that takes `family`, and names none itself, for each of the tiny models."""
    named = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not named:
        metafunc.parametrize("family", tiny_families.FAMILIES)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items):
    """Marks every case of a grid as slow except those whose ids its mark `thin` names, and what is `compiled`.

    Slow cases of a grid are marked `grid` too: continuous integration leaves them out.
    """
    for item in items:
        if "devices_of" in item.fixturenames:
            item.add_marker(pytest.mark.compiled)
        if (mark := item.get_closest_marker("thin")) and item.callspec.id not in mark.args:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.grid)


WORDS = [f"w{i}" for i in range(56)]
SPECIALS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(SPECIALS) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def norm_close(actual, expected, tolerance: float):
    """Asserts ||actual - expected|| <= tolerance * ||expected|| leaf by leaf; reordered sums round every element."""
    actual, expected = jax.device_get((actual, expected))

    def check(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        difference, size = np.linalg.norm(a - b), np.linalg.norm(b)
        name = jax.tree_util.keystr(path)
        assert difference <= tolerance * size, f"{name}: difference {difference:.3g} of {size:.3g}"

    jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.fixture(scope="session")
def assert_norm_close():
    """See `norm_close`."""
    return norm_close


@pytest.fixture(scope="session")
def one_device():
    """A mesh of one device."""
    return make_mesh(MeshOptions(data=1), devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def devices_of() -> Callable[[str], list[jax.Device]]:
    """The devices of a topology; skips a test where a package is missing that compiles for it."""

    def devices(topology: str) -> list[jax.Device]:
        try:
            return topology_devices(topology)
        except InputError as error:
            if "pip install" not in str(error):
                raise
            pytest.skip(str(error))

    return devices


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    """The dictionary of a small Llama's config.json: two layers, grouped queries, sixty words."""
    return dict(TINY_CONFIG)


@pytest.fixture(scope="session")
def tiny_model() -> CausalLM:
    return CausalLM.from_hf(TINY_CONFIG)


@pytest.fixture(scope="session")
def tiny_params(tiny_model):
    """Random parameters; norms are not 1 and logits are not flat, so that no part of the model can be left out."""
    params = jax.jit(tiny_model.init)(jax.random.key(0))
    noise = jax.random.key(1)

    def shake(path, x):
        if "norm" not in jax.tree_util.keystr(path):
            return x
        return x + 0.3 * jax.random.normal(jax.random.fold_in(noise, x.size), x.shape)

    return jax.tree_util.tree_map_with_path(shake, params)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per word; prompts begin with BOS, and PAD differs from EOS."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]", unk_token="[UNK]"
    )


@pytest.fixture(scope="session")
def families():
    """The module `tiny_families`."""
    return tiny_families


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory, tiny_tokenizer):
    """`family_folder(name, seed=0)`: a tiny model of `tiny_families.FAMILIES`. Read-only."""
    pytest.importorskip("torch")
    place = tmp_path_factory.mktemp("families")

    def make(name, seed=0):
        folder = place / f"{name}-{seed}"
        if not folder.exists():
            tiny_families.make(name, folder, seed)
            hub.write_tokenizer(folder, tiny_tokenizer)
        return folder

    return make


@pytest.fixture(scope="session")
def read_family(one_device):
    """`read_family(folder)`: (model, params) of a folder; where it has longrope, for texts of 3 to 40 tokens."""

    def read(folder):
        model = hub.read_model(folder)
        if (context := model.config.longrope_context) is not None:
            model = replace(model, compute=ComputeOptions(longrope="short" if context >= 40 else "long"))
        return model, hub.read_params(folder, model, param_shardings(model, one_device, MeshOptions()))

    return read


@pytest.fixture(scope="session")
def open_family(family_folder, read_family):
    """`open_family(name, seed=0)`: (model, params) of `family_folder(name, seed)`."""
    return cache(lambda name, seed=0: read_family(family_folder(name, seed)))


@pytest.fixture(scope="session")
def torch_family(family_folder):
    """`torch_family(name, seed=0)`: the same model in torch."""
    return cache(lambda name, seed=0: tiny_families.open_torch(family_folder(name, seed)))


@pytest.fixture(scope="session")
def fit_exactly():
    """`exact_dpo.fit_exactly`."""
    return load_helper("exact_dpo.py").fit_exactly


@pytest.fixture(scope="session")
def beam_parity():
    """The module `real/beam_parity`."""
    pytest.importorskip("torch")
    return load_helper("real/beam_parity.py")


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory, tiny_model, tiny_params, tiny_tokenizer):
    """The tiny model as a Hugging Face folder. Read-only."""
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    hub.write_folder(folder, tiny_model, tiny_params, tiny_tokenizer, "float32")
    return folder


def write_pairs(path, rows: int, seed: int):
    """Pairs of varied lengths: prompts of 2 to 6 words, responses of 1 to 8."""
    rng = np.random.default_rng(seed)

    def text(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high + 1)))

    lines = [{"prompt": text(2, 6), "chosen": text(1, 8), "rejected": text(1, 8)} for _ in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def train_file(tmp_path_factory):
    """Forty pairs in JSON lines."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "train.jsonl", rows=40, seed=0)


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory):
    """Eleven pairs in JSON lines: not a multiple of any batch size used here."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "eval.jsonl", rows=11, seed=1)


@pytest.fixture(scope="session", autouse=True)
def own_datasets_cache(tmp_path_factory):
    """Keeps tokens of tests away from the user's."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Frees compiled programs before the process reaches Linux's limit of 65,530 memory maps.

    Each program takes several maps, and the compiler crashes with a segmentation fault when it gets no more. A process
    with 20,000 maps uses three to four gigabytes, and there is one process per core.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def kept_programs(tmp_path_factory):
    """`with kept_programs():` caches the programs compiled inside it, which every run would otherwise compile again.

    For one device only: cached CPU programs can enter their collectives in a different order on each device, and
    deadlock (jaxlib 0.10.2).
    """
    folder = str(tmp_path_factory.mktemp("programs"))

    @contextmanager
    def keep():
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # or JAX keeps the setting of its first compilation
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
            compilation_cache.reset_cache()

    return keep


@pytest.fixture(scope="session")
def on_devices(kept_programs):
    """`with on_devices(N):` limits runs and verbs to the first N devices; one compiles fastest."""

    @contextmanager
    def see(count):
        def make(options=MeshOptions(), devices=None):
            return make_mesh(options, jax.devices()[:count] if devices is None else devices)

        with kept_programs() if count == 1 else nullcontext(), pytest.MonkeyPatch.context() as patch:
            modules = (
                "training.run",
                "training.rl.run",
                "decoding.run",
                "evaluation.score",
                "evaluation.selecting",
                "evaluation.rewards",
                "evaluation.insights.sweep.measure",
            )
            for module in modules:
                patch.setattr(f"qstar_jax.{module}.make_mesh", make)
            # Measuring the processor and estimating memory would take longer than a tiny run.
            patch.setattr("qstar_jax.training.run.peak_flops", lambda devices: 1e12)
            for module in ("training.run", "training.rl.run"):
                patch.setattr(f"qstar_jax.{module}.estimate", lambda *args, **options: "")
            yield

    return see


@pytest.fixture
def one_device_only(on_devices):
    """See `on_devices`."""
    with on_devices(1):
        yield


def pair_examples(rows, *, seed=0, length=16, response_length=8, responses=2) -> list[Example]:
    """Random prompts and responses of many lengths; the first prompt has a single token."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(3, 60, rng.integers(low, high + 1)).astype(np.int32)

    examples = [
        Example(
            ids(2, length - response_length),
            False,
            tuple(Response(ids(1, response_length), False) for _ in range(responses)),
            row,
        )
        for row in range(rows)
    ]
    examples[0] = replace(examples[0], prompt=examples[0].prompt[:1])
    return examples


@pytest.fixture(scope="session")
def random_examples():
    """See `pair_examples`."""
    return pair_examples


def dialogue_examples(rows, *, seed=0, length=24, response_length=16, **options) -> list[Example]:
    """Random examples whose responses have turns, and an environment that speaks between them."""

    def split(response, rng):
        speakers = np.cumsum(rng.random(len(response.ids)) < 0.4)
        turns = np.where(speakers % 2 == 0, speakers // 2, -1).astype(np.int32)
        return Response(response.ids, response.truncated, turns >= 0, turns)

    examples = pair_examples(rows, seed=seed, length=length, response_length=response_length, **options)
    rngs = [np.random.default_rng(row) for row in range(rows)]
    return [
        replace(e, responses=tuple(split(r, rng) for r in e.responses)) for e, rng in zip(examples, rngs, strict=True)
    ]


@pytest.fixture(scope="session")
def random_dialogues():
    """See `dialogue_examples`."""
    return dialogue_examples


@pytest.fixture(scope="session")
def pair_batch():
    """Makes a batch of random pairs, two rows of them packed: `pair_batch(rows, seed=0, fill_to=0, layout=...)`."""

    def make(rows, *, fill_to=0, layout="packed", shards=1, row_length=64, **options):
        examples = pair_examples(rows, **options)
        size = fill_to or rows
        shapes = Shapes.of(examples, layout, batch_size=size, row_length=row_length, shards=shards, multiple=4)
        return jax.tree.map(jax.numpy.asarray, make_batch(examples, shapes, fill_to=fill_to))

    return make


@pytest.fixture
def respond() -> Callable[..., ScoredResponse]:
    """Makes an answer out of pieces and rewards; the other numbers follow from these and can be told apart."""

    def make(pieces, rewards, *, role="answer", row=0, prompt="Say it.", truncated=False) -> ScoredResponse:
        beta, count = 0.1, len(pieces)
        ref_logp = tuple(-1.0 - 0.12 * index for index in range(count))
        logp = tuple(ref + reward / beta for ref, reward in zip(ref_logp, rewards, strict=True))
        v = tuple(2.0 + 0.25 * index for index in range(count))
        return ScoredResponse(
            row=row,
            role=role,
            prompt=prompt,
            pieces=tuple(pieces),
            token_ids=tuple(range(100, 100 + count)),
            logp=logp,
            ref_logp=ref_logp,
            reward=tuple(rewards),
            q=tuple(beta * lp + value for lp, value in zip(logp, v, strict=True)),
            v=v,
            truncated=truncated,
            beta=beta,
        )

    return make


@pytest.fixture
def dialogue(respond) -> ScoredResponse:
    """Two turns with an environment between them; the second turn repeats a question, and its words are hostile."""
    pieces = ["Red?", "<eos>", "No.", "Red", "{{ 7*7 }}<b>", "<eos>"]
    response = respond(pieces, [0.5, 0.25, 0.0, -1.0, 0.125, -0.25])
    return replace(response, action_mask=(True, True, False, True, True, True), turn=(0, 0, -1, 1, 1, 1))


@pytest.fixture(scope="session")
def left_padded():
    """Function of lengths [B] and S: positions and causal mask of sequences padded at their beginning."""

    def layout(lengths, length):
        slots, start = jnp.arange(length), length - lengths[:, None]
        causal = slots[None, :] <= slots[:, None]
        visible = (slots >= start)[:, None, :] | jnp.eye(length, dtype=bool)  # padding sees itself only
        return jnp.maximum(slots - start, 0), causal[None] & visible

    return layout
