"""From a plan to a state on the mesh: a fresh one from a model, or the one that a checkpoint holds."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qstar_jax.config import LoraOptions
from qstar_jax.config.compare import keep_date
from qstar_jax.config.paths import recorded
from qstar_jax.data.chat_templates import adopt_template, find_template
from qstar_jax.errors import InputError
from qstar_jax.models import CausalLM
from qstar_jax.models.causal_lm import Params
from qstar_jax.models.decoder import SHARDING_OVERRIDES
from qstar_jax.models.lora import split_adapter
from qstar_jax.sharding import tree_shardings
from qstar_jax.store import hub
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.checkpoints import BASE, REFERENCE, Description, abstract_with_shardings, read_checkpoint_params
from qstar_jax.store.identity import check_weights, weights_identity
from qstar_jax.store.open import load_model, param_shardings
from qstar_jax.training.continuation import check_same_options
from qstar_jax.training.metrics import Metrics
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.step import TrainState, TrainStep, make_train_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        model: The model, with the adapter that is trained, if any.
        tokenizer: Its tokenizer.
        step: Steps done already.
        params: Parameters of a fresh run, without an adapter; None if they are in the checkpoint of `step`.
        reference: Identity of the frozen reference; None if the loss has none.
        generation: Dictionary of the model's generation_config.json (see `store.open.LoadedModel`).
        date: Day that chat templates take for today, if known already (see `DataOptions.date`).
        base: Identity of the frozen base of an adapter; None without one.
        began: Description in the checkpoint; None for a fresh run.
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

    @property
    def window(self) -> list[Metrics]:
        """Metrics of steps that a run which was stopped has not logged."""
        window = self.began.window if self.began else []
        return [{name: tuple(pair) for name, pair in metrics.items()} for metrics in window]


def find_start(plan: RunPlan, store: CheckpointStore, mesh: Mesh, step: int | None = None) -> Start:
    """Opens the model, or the checkpoint from which the run resumes.

    Args:
        plan: The run.
        store: Its checkpoints.
        mesh: Devices.
        step: Step of the checkpoint; the newest that is whole by default.

    Raises:
        InputError: If the model cannot be used, or the run in `out` was made with other options.
    """
    config, step = plan.config, store.newest_whole() if step is None else step
    if step is None:
        loaded = load_model(config.model, config.compute, mesh, config.mesh)
        model = with_adapter(loaded.model, config.lora)
        tokenizer = adopt_template(loaded.tokenizer, config.data.chat_template)
        needed = plan.objective.uses_reference
        identity = weights_identity(loaded.model, loaded.params) if needed or model.lora else None
        return Start(
            model,
            tokenizer,
            params=loaded.params,
            reference=identity if needed else None,
            generation=loaded.generation,
            date=config.data.date,
            base=identity if model.lora else None,
        )
    description = store.describe(step)
    check_same_options(plan, description.options)
    model, tokenizer = description.build_model(config.compute), description.build_tokenizer()
    _check_same_template(tokenizer, plan)
    return Start(
        model,
        tokenizer,
        step,
        reference=description.reference,
        generation=description.generation,
        date=keep_date(config.data, description.options).date,
        base=description.base,
        began=description,
    )


def with_adapter(model: CausalLM, options: LoraOptions) -> CausalLM:
    """Returns the model with the adapter that the options ask for, if any.

    Raises:
        InputError: If they contradict each other, or do not fit the model.
    """
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


def _check_same_template(tokenizer: "PreTrainedTokenizerBase", plan: RunPlan):
    choice = plan.config.data.chat_template
    if choice is not None and find_template(tokenizer, choice) != find_template(tokenizer, None):
        raise InputError(
            f"--resume: data.chat_template {choice} holds another template than the run in "
            f"{plan.config.out} began with; restore that one, or begin a new run in another --out"
        )


def describe(plan: RunPlan, start: Start, data: dict[str, Any]) -> Description:
    """Collects what is stored beside the parameters; `data` is the identity of the run's examples."""
    return Description(
        verb=plan.verb,
        model=start.model.to_hf(),
        options=recorded(plan.config),
        tokenizer=hub.tokenizer_files(start.tokenizer),
        reference=start.reference,
        lora=start.model.lora and asdict(start.model.lora),
        generation=start.generation,
        base=start.base,
        data=data,
    )


def build_state(
    plan: RunPlan,
    start: Start,
    optimizer: optax.GradientTransformation,
    store: CheckpointStore,
    mesh: Mesh,
    description: Description,
) -> TrainState:
    """Builds the state, every array on its sharding; a fresh run also writes what stays frozen.

    Raises:
        InputError: If the run's reference is no longer the one with which it began.
    """
    abstract = abstract_state(plan, start.model, optimizer, mesh)
    if start.params is None:
        arrays = _restore(plan, start, store, abstract)
    else:
        arrays = _initialize(plan, start, optimizer, store, description, abstract)
    step, finite = jax.device_put((jnp.int32(start.step), jnp.bool(True)), abstract.step.sharding)
    return TrainState(step=step, finite=finite, **arrays)


def abstract_state(plan: RunPlan, model: CausalLM, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of a run's state; the devices need not be there."""
    options, everywhere = plan.config.mesh, NamedSharding(mesh, PartitionSpec())
    params = abstract_with_shardings(model.abstract_params(), param_shardings(model, mesh, options))
    base, adapter = split_adapter(params)
    trained = base if model.lora is None else adapter
    opt_state = jax.eval_shape(optimizer.init, trained)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        params=trained,
        opt_state=abstract_with_shardings(opt_state, tree_shardings(opt_state, mesh, options, SHARDING_OVERRIDES)),
        ref_params=base if plan.holds_reference else None,
        frozen=None if model.lora is None else base,
        finite=jax.ShapeDtypeStruct((), jnp.bool, sharding=everywhere),
    )


def jit_step(plan: RunPlan, model: CausalLM, optimizer: optax.GradientTransformation, state: TrainState) -> TrainStep:
    """Makes and jits the step of a run; the state, which may be abstract, keeps its shardings and its buffers."""
    objective = plan.objective
    train_step = make_train_step(
        objective.loss_fn(model),
        optimizer,
        accumulate=plan.config.train.accumulate,
        prepare=objective.prepare and objective.prepare(model),
        sync_every=plan.reference.sync_every,
        sync_mix=plan.reference.sync_mix,
    )
    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings(state), state.step.sharding))


def _initialize(
    plan: RunPlan,
    start: Start,
    optimizer: optax.GradientTransformation,
    store: CheckpointStore,
    description: Description,
    abstract: TrainState,
) -> dict[str, Any]:
    """Arrays of a fresh state."""
    model, params, frozen, ref_params = start.model, start.params, None, None
    if plan.holds_reference:
        # A copy: the state is donated to each step, so the policy may not share its buffers.
        ref_params = jax.tree.map(jnp.copy, params)
    if model.lora is not None:
        store.save_frozen(BASE, params, description)
        frozen, init = params, jax.jit(model.init_adapter, out_shardings=_shardings(abstract.params))
        params = init(jax.random.key(plan.config.train.seed))
    elif plan.objective.uses_reference:
        store.save_frozen(REFERENCE, params, description)  # also if it is cached: `score` reads it
    opt_state = jax.jit(optimizer.init, out_shardings=_shardings(abstract.opt_state))(params)
    return {"params": params, "opt_state": opt_state, "ref_params": ref_params, "frozen": frozen}


def _restore(plan: RunPlan, start: Start, store: CheckpointStore, abstract: TrainState) -> dict[str, Any]:
    """Arrays of the state in a checkpoint."""
    has_adapter = start.model.lora is not None
    base = abstract.frozen if has_adapter else abstract.params
    arrays = store.restore(start.step, saved_arrays(plan, abstract))

    def read_frozen(name: str, identity: str | None) -> Params:
        params = read_checkpoint_params(store.run / name, start.model.base, _shardings(base))
        check_weights(start.model.base, params, identity, store.run / name, "begin a new run")
        return params

    if has_adapter:
        arrays["frozen"] = read_frozen(BASE, start.base)
    if plan.holds_reference and not plan.moves_reference:
        arrays["ref_params"] = read_frozen(BASE if has_adapter else REFERENCE, start.reference)
    return arrays


def state_shardings(state: TrainState) -> TrainState:
    """Shardings of a state, which a step keeps."""
    return _shardings(state)


def _shardings(abstract):
    return jax.tree.map(lambda x: x.sharding, abstract)


def saved_arrays(plan: RunPlan, state: TrainState) -> dict[str, Any]:
    """Arrays of a state that go into a checkpoint; the others do not change, or follow from the step."""
    arrays = {"params": state.params, "opt_state": state.opt_state}
    return arrays | ({"ref_params": state.ref_params} if plan.moves_reference else {})
