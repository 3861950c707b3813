"""Training from Python: rows in, a run out that every verb of the command line reads."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qstar_jax.api.messages import in_python
from qstar_jax.api.model import Model, load
from qstar_jax.config import DpoConfig, RlConfig, SftConfig
from qstar_jax.errors import InputError
from qstar_jax.evaluation.rewards import reward_maker
from qstar_jax.report.curves import curves_png, write_curves
from qstar_jax.training.rl.rewards import Reward
from qstar_jax.training.rl.run import train_rl
from qstar_jax.training.run import train
from qstar_jax.training.run_log import read_metrics

Rows = Sequence[Mapping[str, Any]] | str | Path


@dataclass(frozen=True)
class Run:
    """A finished run; in a notebook, its curves.

    Attributes:
        out: Its folder, which `load` and every verb of the command line read.
        summary: The last metrics of training and evaluation.
    """

    out: Path
    summary: dict[str, Any]

    @cached_property
    def model(self) -> Model:
        """The trained model; an adapter is merged into its base."""
        return load(self.out)

    @property
    def metrics(self) -> dict[str, tuple[list[int], list[float]]]:
        """All metrics: name -> (steps, values)."""
        return read_metrics(self.out)

    def _repr_png_(self) -> bytes:
        return curves_png(self.out)


def dpo(
    model: Model | str | Path,
    pairs: Rows,
    *,
    eval_pairs: Rows | None = None,
    out: str | Path | None = None,
    config: DpoConfig | None = None,
    **options: Any,
) -> Run:
    """Trains a model on preference pairs, by DPO unless another loss is named.

    Args:
        model: A model, or what `load` opens.
        pairs: Rows with prompt, chosen and rejected, or whatever else `qstar dpo --data.train` reads; or a file.
        eval_pairs: Held-out rows, evaluated before and after training.
        out: Folder of the run; None: a new temporary folder. Rows that are given in Python are kept in it.
        config: All options of `qstar dpo`; its model, out and files are replaced.
        **options: Options by their last names, which go before those of `config`: beta, learning_rate, steps,
            batch_size, max_length, as_chat, rank and so on. `loss` and `optimizer` name the loss and the optimizer.
            Names that several blocks have (seed, name) are written with theirs: train__seed.

    Returns:
        The run.

    Raises:
        InputError: An option is unknown or ambiguous, or the model or the data cannot be used.
    """
    return _train(DpoConfig, config, model, {"pairs": pairs, "eval_pairs": eval_pairs}, out, options)


def sft(
    model: Model | str | Path,
    rows: Rows,
    *,
    eval_rows: Rows | None = None,
    out: str | Path | None = None,
    config: SftConfig | None = None,
    **options: Any,
) -> Run:
    """Fine-tunes a model on responses; arguments, result and errors are those of `dpo`."""
    return _train(SftConfig, config, model, {"rows": rows, "eval_rows": eval_rows}, out, options)


def rl(
    model: Model | str | Path,
    prompts: Rows,
    *,
    reward: Reward | None = None,
    eval_prompts: Rows | None = None,
    out: str | Path | None = None,
    config: RlConfig | None = None,
    **options: Any,
) -> Run:
    """Trains a model on a reward of its own samples, by RLOO unless PPO is named.

    Args:
        model: A model, or what `load` opens.
        prompts: Rows with a prompt, or whatever else `qstar rl --data.train` reads; or a file.
        reward: A function of a list of (prompt, response) texts that returns a number for each; prompts are those of
            the rows, without the chat template. None: what `config.reward` names.
        eval_prompts: Held-out rows.
        out: Folder of the run; None: a new temporary folder. Rows that are given in Python are kept in it.
        config: All options of `qstar rl`; its model, out and files are replaced.
        **options: Options by their last names, as for `dpo`: samples_per_prompt, kl_coef, guide, learning_rate, steps
            and so on. Those that both data or training and a reward model have are the former's (reward__max_length is
            the latter's).

    Returns:
        The run.

    Raises:
        InputError: An option is unknown or ambiguous, the model or the data cannot be used, or a response has no
            reward.
    """
    config = config or RlConfig(model="", out="")
    if reward is not None:
        config = replace(config, reward=replace(config.reward, kind="function"))

    def train_on_samples(config: RlConfig, watch: Callable[[], None] | None) -> dict[str, Any]:
        make_reward = reward_maker(config) if reward is None else lambda prompts: reward
        return train_rl(config, make_reward, watch=watch)

    rows = {"prompts": prompts, "eval_prompts": eval_prompts}
    return _train(RlConfig, config, model, rows, out, options, train_on_samples)


def _train_on_rows(config: DpoConfig | SftConfig, watch: Callable[[], None] | None) -> dict[str, Any]:
    return train(config, watch=watch)


def _train(
    kind: type[DpoConfig | SftConfig | RlConfig],
    config: DpoConfig | SftConfig | RlConfig | None,
    model: Model | str | Path,
    rows: Mapping[str, Rows | None],
    out: str | Path | None,
    options: dict[str, Any],
    run_training: Callable[[Any, Callable[[], None] | None], dict[str, Any]] = _train_on_rows,
) -> Run:
    """Trains on the rows of two arguments: those for training, and held-out ones."""
    lines = {argument: _lines(argument, several) for argument, several in rows.items()}
    folder = Path(tempfile.mkdtemp(prefix="qstar-") if out is None else out)
    source = model.source if isinstance(model, Model) else str(model)
    config = replace(config or kind(model=source, out=str(folder)), model=source, out=str(folder))
    config = with_options(config, options)
    files = {}
    for argument, name in zip(rows, ("train", "eval"), strict=True):
        given = rows[argument] if lines[argument] is None else _write(lines[argument], folder / f"{name}.jsonl")
        files[name] = None if given is None else str(given)
    named = {file: argument for argument, file in zip(rows, files.values(), strict=True) if lines[argument] is not None}
    data = replace(config.data, **files)
    display = notebook_display(folder)
    with in_python(config, named, dict(zip(("data.train", "data.eval"), rows, strict=True))):
        summary = run_training(replace(config, data=data), display)
    write_curves(folder)
    run = Run(folder, summary)
    if config.export is not None:
        run.model.save(config.export)
    return run


def with_options(config: Any, options: Mapping[str, Any]) -> Any:
    """Sets options of a configuration that are named by the last part of their names.

    Args:
        config: Blocks of options.
        options: `beta` is loss.beta, `train__seed` train.seed; `loss` and `optimizer`, with a text as their value, are
            loss.name and optimizer.name.

    Raises:
        InputError: A name is unknown, or several blocks have it.
    """
    blocks = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    blocks = {name: block for name, block in blocks.items() if is_dataclass(block)}
    owners = {f"{block}__{entry.name}": block for block, value in blocks.items() for entry in fields(value)}
    for name, value in options.items():
        # Find the one option that is meant.
        wanted = f"{name}__name" if isinstance(value, str) and f"{name}__name" in owners else name
        matches = [full for full in owners if wanted in (full, full.partition("__")[2])]
        if len(matches) > 1:  # a reward model has lengths and batches of its own, by their full names
            matches = [full for full in matches if not full.startswith("reward__")]
        if len(matches) != 1:
            found = f"it may be {' or '.join(matches)}" if matches else f"expected some of {', '.join(sorted(owners))}"
            raise InputError(f"option {name!r} is {'ambiguous' if matches else 'unknown'}: {found}")
        block, _, key = matches[0].partition("__")
        blocks[block] = replace(blocks[block], **{key: value})
    return replace(config, **blocks)


def _lines(argument: str, rows: Rows | None) -> list[str] | None:
    """The lines of a file that holds these rows; None if they are in a file already, or there are none.

    Raises:
        InputError: They are no list of dictionaries, or cannot be written as JSON.
    """
    if rows is None or isinstance(rows, str | Path):
        return None
    if isinstance(rows, Mapping):
        raise InputError(
            f"{argument} is a dictionary: expected a list of rows, each a dictionary; of columns they are made with "
            "[dict(zip(columns, row)) for row in zip(*columns.values())]"
        )
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(
                f"{argument}[{number}] is a {type(row).__name__}: expected a dictionary, such as "
                "{'prompt': ..., 'chosen': ..., 'rejected': ...}"
            )
        try:
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise InputError(f"{argument}[{number}]: {error}; expected text, numbers, lists, dictionaries") from error
    if not lines:
        raise InputError(f"{argument} has no rows")
    return lines


def _write(lines: Sequence[str], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def notebook_display(run: Path) -> Callable[[], None] | None:
    """Returns a function that redraws a run's curves in the output of a notebook's cell; None outside of one."""
    try:
        from IPython import get_ipython
        from IPython.display import Image, display
    except ImportError:
        return None
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):  # a terminal shows a bar
        return None
    handle = None

    def redraw() -> None:
        nonlocal handle
        image = Image(curves_png(run))
        if handle is None:
            handle = display(image, display_id=True)
        else:
            handle.update(image)

    return redraw
