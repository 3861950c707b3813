"""Where a training of a pipeline begins: its models or their checkpoints, and its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.console import say
from qstar_jax.decoding.eos import Decodable, eos_token_ids
from qstar_jax.errors import InputError
from qstar_jax.pipeline.language import LanguageStage
from qstar_jax.pipeline.plan import PipelinePlan
from qstar_jax.pipeline.rows import PairRow, labelled, read_pairs
from qstar_jax.pipeline.stage import Stage
from qstar_jax.pipeline.template import Template
from qstar_jax.store.checkpoint_store import CheckpointStore
from qstar_jax.store.checkpoints import STEPS, Description, find_fault
from qstar_jax.store.open import load_model
from qstar_jax.training.continuation import check_same_data, data_identity
from qstar_jax.training.setup import Start, describe, find_start


@dataclass(frozen=True)
class Opened:
    """The models of a run.

    Attributes:
        stages: All stages.
        starts: Where each trained one begins, by name.
        fixed: Parameters of the others, by name; empty if nobody samples.
    """

    stages: tuple[LanguageStage, ...]
    starts: dict[str, Start]
    fixed: dict[str, Any]

    @property
    def first(self) -> Start:
        """Where the first trained stage begins; the others begin at the same step."""
        return next(iter(self.starts.values()))

    def of(self, ref_params: Mapping[str, Any] | None) -> list[Stage]:
        """Makes stages from the references' parameters; an adapter's reference is its base."""
        return [stage.stage((ref_params or {}).get(stage.name)) for stage in self.stages]


def open_pipeline(plan: PipelinePlan, stores: Mapping[str, CheckpointStore], mesh: Mesh) -> Opened:
    """Opens all models: trained ones at the newest step that all have, the others from where they lie.

    Args:
        plan: The run.
        stores: Checkpoints of each trained stage, by name.
        mesh: Devices.

    Raises:
        InputError: If a model cannot be used, or the run was begun with other options.
    """
    config, step = plan.config, _newest_step(stores)
    starts = {name: find_start(run, stores[name], mesh, step) for name, run in plan.runs.items()}
    fixed = {}
    if config.data.eval and config.samples.eval_prompts:
        others = [stage for stage in plan.stages if not stage.train]
        fixed = {one.name: load_model(one.model, config.compute, mesh, config.mesh) for one in others}
    # What is measured in training is the policy itself, so it is sampled at temperature 1.
    stages = language_stages(plan, starts | fixed, mesh, temperature=1.0)
    return Opened(stages, starts, {name: loaded.params for name, loaded in fixed.items()})


def _newest_step(stores: Mapping[str, CheckpointStore]) -> int | None:
    """The newest step that all stages have, as it was written; None if none has any."""
    newest = {name: store.newest_whole() for name, store in stores.items()}
    steps = [step for step in newest.values() if step is not None]
    if not steps:
        return None
    for name, store in stores.items():
        folder = store.run / STEPS / str(min(steps))
        fault = "there is none" if newest[name] is None else find_fault(folder)
        if fault:
            raise InputError(
                f"--resume: the newest checkpoint that the other stages have is {min(steps)}, but {folder}: {fault}; "
                "restore it, or begin anew in another --out"
            )
    return min(steps)


def language_stages(
    plan: PipelinePlan, models: Mapping[str, Decodable], mesh: Mesh, *, temperature: float
) -> tuple[LanguageStage, ...]:
    """Makes the stages of a plan from their models; those without one can neither draw nor be scored.

    Args:
        plan: The plan.
        models: Their models, by name.
        mesh: Devices.
        temperature: Divides the logits when they are sampled.
    """
    made: dict[str, LanguageStage] = {}
    for options in plan.stages:
        opened = models.get(options.name)
        made[options.name] = LanguageStage(
            name=options.name,
            model=opened and opened.model,
            tokenizer=opened and opened.tokenizer,
            eos_ids=eos_token_ids(opened) if opened else (),
            mesh=mesh,
            template=Template(options.template),
            earlier={name: stage.read for name, stage in made.items()},
            max_new_tokens=options.max_new_tokens,
            beta=options.beta,
            temperature=temperature,
            data=plan.data(options),
        )
    return tuple(made.values())


def load_rows(plan: PipelinePlan, console: Console) -> tuple[list[PairRow], list[PairRow] | None]:
    """Reads the compared rows to train on, and the held-out ones, if there are any.

    Raises:
        InputError: If a row is wrong, or nobody has compared any.
    """
    names, data = [stage.name for stage in plan.stages], plan.config.data

    def read(source: str, limit: int | None) -> list[PairRow]:
        rows = read_pairs(source, names, limit)
        compared = labelled(rows, source)
        if len(compared) < len(rows):
            say(console, f"{source}: {len(rows) - len(compared)} rows are not compared yet (better is null)")
        return compared

    train = read(data.train, data.max_train_rows)
    return train, None if data.eval is None else read(data.eval, data.max_eval_rows)


def describe_stages(
    plan: PipelinePlan, opened: Opened, train: Sequence[Any], held_out: Sequence[Any] | None, console: Console
) -> dict[str, Description]:
    """Describes the checkpoints of each trained stage, and refuses to resume with other rows.

    Args:
        plan: The run.
        opened: Its models.
        train: Examples of the rows to train on (see `rows.row_examples`).
        held_out: Those of held-out rows.
        console: Where to say what the user should know.

    Raises:
        InputError: If the rows are not those with which the run began.
    """
    descriptions = {}
    for place, stage in enumerate(opened.stages):
        if stage.name not in plan.runs:
            continue
        run, start = plan.runs[stage.name], opened.starts[stage.name]
        both = [parts and [*parts[place][0], *parts[place][1]] for parts in (train, held_out)]
        identity = data_identity(*both)
        if start.began and (note := check_same_data(run, start.began, identity)):
            say(console, note)
        descriptions[stage.name] = describe(run, start, identity)
    return descriptions
