"""`qstar generate`."""

import time

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from qstar_jax.caches import keep_programs
from qstar_jax.config import GenerateConfig
from qstar_jax.data.dropped import counted_reasons
from qstar_jax.data.loading import load_examples
from qstar_jax.data.preferences import prompt_records
from qstar_jax.data.tokenization import Example, tokenize
from qstar_jax.decoding.answers_file import FIX, AnswersFile, answer_prompts
from qstar_jax.decoding.decoder import Answer, Decoder
from qstar_jax.decoding.generate import Guide, prepare
from qstar_jax.decoding.options import check_options, needs_reference
from qstar_jax.errors import InputError
from qstar_jax.evaluation.references import find_beta, find_reference
from qstar_jax.loading import LoadedModel, load_model
from qstar_jax.sharding import make_mesh


def run(config: GenerateConfig):
    """Answers prompts; writes generations.jsonl, batch by batch, and goes on with one that is there."""
    console = Console()
    _check(config)
    file = AnswersFile(config)
    mesh = make_mesh(config.mesh)
    keep_programs()
    with jax.set_mesh(mesh):
        loaded = load_model(config.model, config.compute, mesh, config.mesh)
        examples = _prompts(config, loaded.tokenizer)
        texts = {e.row: loaded.tokenizer.decode(e.prompt, skip_special_tokens=False) for e in examples}
        _check_prompts(file, texts)
        done = len(texts.keys() & file.prompts.keys())
        if done == len(examples):
            _say(console, f"nothing to do: all {done} prompts are answered in {file.path}")
            return
        if done:
            _say(console, f"{done} of {len(examples)} prompts are answered in {file.path}; going on")
        decoder = _decoder(config, loaded, mesh)
        with file, _Bar(console, len(examples), done) as bar:
            for found in answer_prompts(decoder, examples, texts, file, config.batch_size):
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


def _prompts(config: GenerateConfig, tokenizer) -> list[Example]:
    if config.prompt is None:
        data = config.data
        return load_examples(data.eval, data.eval_split, "prompts", tokenizer, data, data.max_eval_rows).examples
    records, _ = prompt_records([{config.data.prompt: config.prompt}], config.data, "--prompt")
    examples, dropped = tokenize(records, tokenizer, config.data)
    if not examples:
        raise InputError(f"--prompt {config.prompt!r} cannot be used ({counted_reasons(dropped)})")
    return examples


def _check_prompts(file: AnswersFile, texts: dict[int, str]):
    for row, prompt in file.prompts.items():
        if texts.get(row, prompt) != prompt:  # a smaller --data.max_eval_rows leaves rows out
            raise InputError(
                f"{file.path} answers another prompt in row {row}: {prompt!r} there, {texts[row]!r} now; {FIX}"
            )


def _decoder(config: GenerateConfig, policy: LoadedModel, mesh: Mesh) -> Decoder:
    """Loads what is needed beside the policy; a model that is named twice is loaded once."""
    models = {config.model: policy}

    def load(source: str) -> LoadedModel:
        if source not in models:
            models[source] = load_model(source, config.compute, mesh, config.mesh)
        return models[source]

    reference = beta = None
    if needs_reference(config.decode, len(config.pairs)):
        source = find_reference(policy, config.reference, config.model)
        beta = find_beta(policy, config.decode.beta, config.model, "--decode.beta")
        reference = load(str(source))
    guides = [Guide(load(pair.tuned), load(pair.untuned), pair.weight) for pair in config.pairs]
    return prepare(policy, config.decode, mesh, reference=reference, beta=beta, guides=guides, consume=True)


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
