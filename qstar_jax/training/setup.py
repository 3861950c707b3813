"""From a configuration to a state on the mesh: a fresh one from a model, or the one that a checkpoint holds."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import DpoConfig, LoraOptions, SftConfig
from qstar_jax.config.compare import keep_date
from qstar_jax.data.chat_templates import adopt_template, find_template
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.decoder import SHARDING_OVERRIDES
from qstar_jax.models.lora import split_adapter
from qstar_jax.sharding import tree_shardings
from qstar_jax.store import hub
from qstar_jax.store.checkpoints import (
    BASE,
    REFERENCE,
    CheckpointStore,
    Description,
    abstract_with_shardings,
    read_checkpoint_params,
)
from qstar_jax.store.identity import check_weights, weights_identity
from qstar_jax.store.open import load_model, param_shardings
from qstar_jax.training.continuation import check_same_options
from qstar_jax.training.optimizers import make_optimizer
from qstar_jax.training.reference import holds_reference, moves_reference, needs_reference
from qstar_jax.training.step import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        model: The model, with the adapter that is to be trained.
        tokenizer: Its tokenizer.
        step: Steps that are done already.
        params: Parameters of a fresh run, without an adapter; None where `step` is read from a checkpoint.
        reference: Who the frozen reference is; None if the loss has none.
        generation: Dictionary of the model's generation_config.json (see `loading.LoadedModel`).
        date: Day that chat templates take for today, where it is settled already (see `DataOptions.date`).
        base: Who the frozen base of an adapter is; None without one.
        began: What the checkpoint says of the run; None for a fresh one.
    """

    model: CausalLM
    tokenizer: "PreTrainedTokenizerBase"
    step: int = 0
    params: Params | None = None
    reference: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    base: str | None = None
    began: Description | None = None


def find_start(config: SftConfig | DpoConfig, store: CheckpointStore, mesh: Mesh) -> Start:
    """Opens the model, or finds the checkpoint from which the run goes on.

    Raises:
        InputError: If the model cannot be used, or the run in `out` was made with other options.
    """
    step = store.latest_step
    if step is None:
        loaded = load_model(config.model, config.compute, mesh, config.mesh)
        model, needed = _with_adapter(loaded.model, config.lora), needs_reference(config)
        tokenizer = adopt_template(loaded.tokenizer, config.data.chat_template)
        identity = weights_identity(loaded.model, loaded.params) if needed or model.lora else None
        who = {"reference": identity if needed else None, "base": identity if model.lora else None}
        kept = {"generation": loaded.generation, "date": config.data.date}
        return Start(model, tokenizer, params=loaded.params, **kept, **who)
    description = store.describe(step)
    check_same_options(config, description.options)
    model, tokenizer = description.build_model(config.compute), description.build_tokenizer()
    _check_same_template(tokenizer, config)
    kept = {name: getattr(description, name) for name in ("reference", "base", "generation")}
    date = keep_date(config.data, description.options).date
    return Start(model, tokenizer, step, date=date, began=description, **kept)


def _with_adapter(model: CausalLM, options: LoraOptions) -> CausalLM:
    if options.rank == 0:
        without_effect = [name for name in ("alpha", "targets") if getattr(options, name) is not None]
        if without_effect:
            raise InputError(
                f"lora.{without_effect[0]} has no effect without an adapter; set lora.rank, for instance 16"
            )
        return model
    alpha = 2 * options.rank if options.alpha is None else options.alpha
    try:
        return model.with_lora(options.rank, alpha, options.targets)
    except InputError as error:
        raise InputError(f"lora: {error}") from error


def _check_same_template(tokenizer: "PreTrainedTokenizerBase", config: SftConfig | DpoConfig):
    choice = config.data.chat_template
    if choice is not None and find_template(tokenizer, choice) != find_template(tokenizer, None):
        raise InputError(
            f"--resume: data.chat_template {choice} holds another template than the run in {config.out} began with; "
            "put that one back, or begin a new run in another --out"
        )


def describe(config: SftConfig | DpoConfig, start: Start, data: dict[str, Any]) -> Description:
    """Collects what is stored beside the parameters; `data` is the identity of the run's examples."""
    verb = "dpo" if isinstance(config, DpoConfig) else "sft"
    files = hub.tokenizer_files(start.tokenizer)
    lora = start.model.lora and asdict(start.model.lora)
    model = start.model.to_hf()
    return Description(verb, model, asdict(config), files, start.reference, lora, start.generation, start.base, data)


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
    base_shardings, adapter_shardings = split_adapter(shardings)
    base, adapter = split_adapter(abstract_with_shardings(model.abstract_params(), shardings))
    trained = base if model.lora is None else adapter
    abstract_opt_state = jax.eval_shape(optimizer.init, trained)
    opt_shardings = tree_shardings(abstract_opt_state, mesh, config.mesh, SHARDING_OVERRIDES)
    frozen = ref_params = None
    if start.params is None:
        abstract = {"params": trained, "opt_state": abstract_with_shardings(abstract_opt_state, opt_shardings)}
        if moves_reference(config):
            abstract["ref_params"] = base
        arrays = store.restore(start.step, abstract)
        params, opt_state = arrays["params"], arrays["opt_state"]
        if model.lora is not None:
            frozen = _read_frozen(store.run / BASE, model.base, base_shardings, start.base)
        if moves_reference(config):
            ref_params = arrays["ref_params"]
        elif holds_reference(config):
            folder = store.run / (REFERENCE if model.lora is None else BASE)
            ref_params = _read_frozen(folder, model.base, base_shardings, start.reference)
    else:
        params = start.params
        if model.lora is not None:
            store.save_frozen(BASE, params, description)
            frozen, init = params, jax.jit(model.init_adapter, out_shardings=adapter_shardings)
            params = init(jax.random.key(config.train.seed))
        elif needs_reference(config):
            store.save_frozen(REFERENCE, params, description)  # also where it is cached: `score` reads it
        opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
        if holds_reference(config):
            # A copy: the state is donated to each step, so the policy may not share its buffers.
            ref_params = jax.tree.map(jnp.copy, start.params)
    step, finite = jax.device_put((jnp.int32(start.step), jnp.bool(True)), NamedSharding(mesh, PartitionSpec()))
    return TrainState(step, params, opt_state, ref_params, frozen, finite)


def _read_frozen(folder: Path, model: CausalLM, shardings: Params, identity: str | None) -> Params:
    params = read_checkpoint_params(folder, model, shardings)
    check_weights(model, params, identity, folder, "begin a new run")
    return params


def saved_arrays(config: SftConfig | DpoConfig, state: TrainState) -> dict:
    """Says what of a state goes into a checkpoint; the rest does not change, or follows from the step."""
    arrays = {"params": state.params, "opt_state": state.opt_state}
    return arrays | ({"ref_params": state.ref_params} if moves_reference(config) else {})
