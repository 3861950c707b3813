"""`qstar generate`."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from qstar_jax.config import GenerateConfig
from qstar_jax.data.loading import Dataset, load_examples, make_dataset
from qstar_jax.data.preferences import prompt_records
from qstar_jax.decoding.answers_file import AnswersFile, answer_prompts, answers_identity, prompt_texts
from qstar_jax.decoding.decoder import Answer
from qstar_jax.decoding.generate import Guide, prepare
from qstar_jax.decoding.options import check_options, needs_reference
from qstar_jax.errors import InputError
from qstar_jax.sharding import make_mesh
from qstar_jax.store import hub
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.store.user_cache import keep_programs


def run(config: GenerateConfig):
    """Answers prompts; writes generations.jsonl, batch by batch, and goes on with one that is there."""
    console = Console()
    _check(config)
    file = AnswersFile(config)
    mesh = make_mesh(config.mesh)
    keep_programs()
    with jax.set_mesh(mesh):
        policy = load_model(config.model, config.compute, mesh, config.mesh)
        if settings := hub.other_settings(policy.generation):
            said = ", ".join(f"{name} {value!r}" for name, value in settings.items())
            _say(console, f"{config.model}: its generation_config.json asks for {said}; only --decode options are read")
        dataset = _prompts(replace(config, data=file.data), policy, console)
        texts = prompt_texts(dataset, policy.tokenizer)
        others = _others(config, policy, mesh)
        file.check(answers_identity(policy, **others), texts, dataset.date)
        rows = [example.row for example in dataset.examples]
        done = sum(row in file.prompts for row in rows)
        if texts.keys() <= file.prompts.keys():
            _say(console, f"nothing to do: all {done} prompts are answered in {file.path}")
            return
        if done:
            _say(console, f"{done} of {len(rows)} prompts are answered in {file.path}; going on")
        decoder = prepare(policy, config.decode, mesh, consume=True, **others)
        with file, _Bar(console, len(rows), done) as bar:
            for found in answer_prompts(decoder, dataset, texts, file, config.batch_size):
                for row, answers in found:
                    _show(texts[row], answers, console)
                bar.advance(len(found), sum(answer.length for _, answers in found for answer in answers))
    _say(console, f"{file.answers} answers: {file.path}")


def _check(config: GenerateConfig):
    """What can be known before anything is loaded."""
    check_options(config.decode, len(config.pairs))
    if config.batch_size < 1:
        raise InputError(f"--batch_size {config.batch_size}: expected at least 1 prompt at once")
    if config.reference and not needs_reference(config.decode, len(config.pairs)):
        raise InputError(
            f"--reference {config.reference} has no effect with method {config.decode.method} and this objective; set "
            "--decode.report_reference true, or an objective that reads it (--decode.objective implicit_reward)"
        )
    if (config.prompt is None) == (config.data.eval is None):
        raise InputError("give either --prompt TEXT or --data.eval FILE (a file with a prompt column)")


def _prompts(config: GenerateConfig, policy: LoadedModel, console: Console) -> Dataset:
    """The prompts, and a line that says what was dropped and cut."""
    data, known = config.data, {"vocabulary": policy.model.config.vocab_size}
    if config.prompt is None:
        source = (data.eval, data.eval_split, "prompts")
        dataset = load_examples(*source, policy.tokenizer, data, data.max_eval_rows, **known)
        _say(console, dataset.report(policy.model, config.decode.max_new_tokens))
        return dataset
    found = prompt_records([{data.prompt: config.prompt}], data, "--prompt")
    dataset = make_dataset(*found, "--prompt", policy.tokenizer, data, **known)
    if dataset.examples[0].prompt_truncated:
        kept = f"{data.max_prompt_length} tokens (data.max_prompt_length)"
        _say(console, f"--prompt is longer than {kept}, and lost its beginning")
    new_tokens = config.decode.max_new_tokens
    if warning := policy.model.check_length(dataset.longest(new_tokens), f"--prompt and {new_tokens} new tokens"):
        _say(console, warning)
    return dataset


def _others(config: GenerateConfig, policy: LoadedModel, mesh: Mesh) -> dict[str, Any]:
    """Loads what is needed beside the policy, as `prepare` takes it; a model that is named twice is loaded once."""
    models = {config.model: policy}

    def load(source: str | Path) -> LoadedModel:
        if source not in models:
            models[source] = load_model(source, config.compute, mesh, config.mesh)
        return models[source]

    reference = beta = None
    if needs_reference(config.decode, len(config.pairs)):
        reference = open_reference(policy, config.reference, config.model, load)
        beta = find_beta(policy, config.decode.beta, config.model, "--decode.beta")
    guides = [Guide(load(pair.tuned), load(pair.untuned), pair.weight) for pair in config.pairs]
    return {"reference": reference, "beta": beta, "guides": guides}


class _Bar:
    """Prompts done and new tokens a second; a context manager, empty where there is no terminal."""

    def __init__(self, console: Console, total: int, done: int):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("generating", total=total, completed=done, rate="")
        self._tokens, self._began = 0, time.perf_counter()

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()

    def advance(self, prompts: int, tokens: int):
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._began)
        self._progress.update(self._task, advance=prompts, rate=f"{rate:,.1f} new tokens/s")


def _say(console: Console, text: str):
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show(prompt: str, answers: list[Answer], console: Console):
    console.print(Text(prompt, style="dim"))
    for answer in answers:
        if answer.finish == "none":
            console.print(Text("no answer was found", style="red"))
            continue
        end = "" if answer.finished else " …"
        console.print(Text(f"[{answer.score:.2f}] ", style="cyan") + Text(answer.text + end))
    console.print()
