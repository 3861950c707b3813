"""`qstar export`."""

from pathlib import Path

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from qstar_jax.config import ComputeOptions, ExportConfig
from qstar_jax.console import say
from qstar_jax.errors import InputError
from qstar_jax.models.lora import split_adapter
from qstar_jax.sharding import join_processes, make_mesh
from qstar_jax.store import hub
from qstar_jax.store.checkpoints import find_checkpoint, read_checkpoint_params, read_description
from qstar_jax.store.open import load_model, param_shardings


def run(config: ExportConfig):
    """Writes a model or an adapter to a Hugging Face folder."""
    _check(config, Path(config.out))  # before the first process can write anything
    join_processes(config.mesh)
    export(config)


def export(config: ExportConfig):
    """Writes a model or an adapter, as `run` does, in a job whose processes have joined already."""
    out, mesh = Path(config.out), make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        (_export_model if config.part == "model" else _export_adapter)(config, out, mesh)
    if jax.process_index() == 0:
        say(Console(), f"written: {out}")


def _check(config: ExportConfig, out: Path):
    """Refuses what cannot be written, before anything is read."""
    hub.check_free(out)
    if config.part == "model" and config.base is not None:
        raise InputError("--base is written into an adapter's file; give --part adapter with it, or leave it out")
    for option in ("dtype", "max_shard_size"):
        if config.part == "adapter" and getattr(config, option) != getattr(ExportConfig, option):
            raise InputError(f"an adapter is one file of float32 numbers; leave --{option} out, or give --part model")
    hub.shard_bytes(config.max_shard_size)


def _export_model(config: ExportConfig, out: Path, mesh: jax.sharding.Mesh):
    loaded = load_model(config.model, ComputeOptions(), mesh, config.mesh)
    generation, size = loaded.generation, config.max_shard_size
    hub.write_folder(out, loaded.model, loaded.params, loaded.tokenizer, config.dtype, generation, size)


def _export_adapter(config: ExportConfig, out: Path, mesh: jax.sharding.Mesh):
    checkpoint = find_checkpoint(Path(config.model))
    description = checkpoint and read_description(checkpoint)
    if description is None or description.lora is None:
        raise InputError(
            f"{config.model} holds no adapter (only a run with lora.rank does); --part model writes the whole model"
        )
    base = config.base or description.options["model"]
    if find_checkpoint(Path(base)) or hub.is_adapter(Path(base)):
        raise InputError(
            f"the adapter's base is {base}, which PEFT cannot open; export that first and name it with --base, "
            "or write the whole model with --part model"
        )
    model = description.build_model(ComputeOptions())
    params = read_checkpoint_params(checkpoint, model, param_shardings(model, mesh, config.mesh))
    adapter = multihost_utils.process_allgather(split_adapter(params)[1], tiled=True)
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = description.build_tokenizer()
        hub.write_tokenizer(out, tokenizer)
        hub.write_generation_config(out, hub.with_eos(description.generation, tokenizer))
        hub.write_adapter(out, model, adapter, base)  # last: a folder with its configuration is an adapter's
