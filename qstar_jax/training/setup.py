"""From a configuration to a state on the mesh: a fresh one from a model, or the one that a checkpoint holds."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.checkpoints import (
    REFERENCE,
    CheckpointStore,
    Description,
    abstract_with_shardings,
    read_checkpoint_params,
    tokenizer_files,
)
from qstar_jax.config import DpoConfig, SftConfig
from qstar_jax.errors import InputError
from qstar_jax.loading import load_model, param_shardings
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.sharding import tree_shardings
from qstar_jax.training.objectives import preference_loss
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.reference import reference_identity
from qstar_jax.training.step import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What may differ between a run and its continuation: the rest decides which numbers come out.
FREE_OPTIONS = (
    "model",  # the checkpoint holds it
    "out",
    "resume",
    "mesh",
    "compute.remat",
    "compute.attention",
    "data.eval",
    "data.eval_split",
    "data.max_eval_rows",
    "reference.cache",
    "train.eval_batch_size",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        step: Steps that are done already.
        params: Parameters of a fresh run; None where `step` is read from a checkpoint.
        reference: Who the frozen reference is; None if the loss has none.
    """

    model: CausalLM
    tokenizer: "PreTrainedTokenizerBase"
    step: int = 0
    params: Params | None = None
    reference: str | None = None


def find_start(config: SftConfig | DpoConfig, store: CheckpointStore, mesh: Mesh) -> Start:
    """Opens the model, or finds the checkpoint from which the run goes on.

    Raises:
        InputError: If `out` holds checkpoints and the run is not to be resumed, or was made with other options.
    """
    step = store.latest_step
    if step is None:
        loaded = load_model(config.model, config.compute, mesh, config.mesh)
        identity = reference_identity(loaded.model, loaded.params) if needs_reference(config) else None
        return Start(loaded.model, loaded.tokenizer, params=loaded.params, reference=identity)
    if not config.resume:
        raise InputError(
            f"{config.out} already holds a run with a checkpoint at step {step}; "
            "add --resume to go on with it, or choose another --out"
        )
    description = store.describe(step)
    _check_same_options(description.options, asdict(config), Path(config.out))
    model, tokenizer = description.build_model(config.compute), description.build_tokenizer()
    return Start(model, tokenizer, step, reference=description.reference)


def _check_same_options(stored: dict, given: dict, out: Path):
    stored, given = _flatten(stored), _flatten(given)
    for name in sorted(stored.keys() | given.keys()):
        free = any(name == option or name.startswith(option + ".") for option in FREE_OPTIONS)
        if not free and stored.get(name) != given.get(name):
            raise InputError(
                f"--resume: {name} was {stored.get(name)!r} in {out} and is {given.get(name)!r} now; "
                "a run goes on with the options it began with (or begins anew in another --out)"
            )


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def needs_reference(config: SftConfig | DpoConfig) -> bool:
    """Whether the run's loss compares the policy with a reference."""
    return isinstance(config, DpoConfig) and preference_loss(config.loss).uses_reference


def holds_reference(config: SftConfig | DpoConfig) -> bool:
    """Whether the reference's parameters are held and run at each step."""
    return needs_reference(config) and config.reference.mode == "live"


def describe(config: SftConfig | DpoConfig, start: Start) -> Description:
    """Collects what is stored beside the parameters."""
    verb = "dpo" if isinstance(config, DpoConfig) else "sft"
    files = tokenizer_files(start.tokenizer)
    return Description(verb, start.model.config.to_hf(), asdict(config), files, start.reference)


def build_state(
    config: SftConfig | DpoConfig,
    start: Start,
    store: CheckpointStore,
    mesh: Mesh,
    steps: int,
    description: Description,
) -> TrainState:
    """Builds the state on the mesh; a fresh DPO run writes its reference first.

    Args:
        config: The run's configuration.
        start: Where it begins.
        store: Its checkpoints.
        mesh: Its devices.
        steps: Its length, for the optimizer's schedule.
        description: What is stored beside the parameters.

    Returns:
        The state, every array on its sharding.

    Raises:
        InputError: If the run's reference is no longer the one with which it began.
    """
    model = start.model
    optimizer = make_optimizer(config.optimizer, steps)
    shardings = param_shardings(model, mesh, config.mesh)
    abstract_params = abstract_with_shardings(model.abstract_params(), shardings)
    abstract_opt_state = jax.eval_shape(optimizer.init, abstract_params)
    opt_shardings = tree_shardings(abstract_opt_state, mesh, config.mesh, model.family.SHARDING_OVERRIDES)
    ref_params = None
    if start.params is None:
        abstract_opt_state = abstract_with_shardings(abstract_opt_state, opt_shardings)
        params, opt_state = store.restore(start.step, abstract_params, abstract_opt_state)
        if holds_reference(config):
            ref_params = read_checkpoint_params(store.run / REFERENCE, model, shardings)
            if start.reference not in (None, reference_identity(model, ref_params)):
                raise InputError(
                    f"--resume: {store.run / REFERENCE} is not the reference with which the run began (its parameters "
                    "differ from what the checkpoint says of them); put that folder back, or begin a new run"
                )
    else:
        params = start.params
        opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
        if needs_reference(config):
            store.save_reference(params, description)  # also where it is cached: `score` reads it
        if holds_reference(config):
            # A copy: the state is donated to each step, so the policy may not share its buffers.
            ref_params = jax.tree.map(jnp.copy, params)
    step = jax.device_put(jnp.int32(start.step), NamedSharding(mesh, PartitionSpec()))
    return TrainState(step, params, opt_state, ref_params)
