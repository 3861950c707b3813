"""Generates responses to the prompts of a file, or to one prompt, as `qstar generate` does."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qstar_jax.config import GenerateConfig
from qstar_jax.config.paths import recorded
from qstar_jax.console import Bar, say, visible
from qstar_jax.data.loading import Dataset, load_examples, make_dataset
from qstar_jax.data.preferences import prompt_records
from qstar_jax.decoding.decoder import Decoder, Generation
from qstar_jax.decoding.generate import Guide, prepare
from qstar_jax.decoding.generations_file import GenerationsFile, generate_missing, generation_identity, prompt_texts
from qstar_jax.decoding.options import DecodePlan, interpret
from qstar_jax.errors import InputError
from qstar_jax.interruption import Stopped
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store import hub
from qstar_jax.store.open import LoadedModel, load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.store.sole_writer import sole_writer
from qstar_jax.store.user_cache import keep_programs


def generate_file(config: GenerateConfig, console: Console):
    """Writes generations.jsonl batch by batch; a file that is incomplete is continued.

    Raises:
        InputError: If options contradict each other, or something that they name cannot be used.
    """
    plan = _check(config)
    file = GenerationsFile(Path(config.out), recorded(config))
    mesh = make_mesh(config.mesh)
    keep_programs()
    with use_mesh(mesh, config.compute.dtype):
        load = cache(partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh))
        policy = load(config.model)
        if settings := hub.other_settings(policy.generation):
            asks = ", ".join(f"{name} {value!r}" for name, value in settings.items())
            say(console, f"{config.model}: its generation_config.json asks for {asks}; only --decode options are read")
        dataset = _prompts(replace(config, data=replace(config.data, date=file.date)), policy, console)
        texts = prompt_texts(dataset, policy.tokenizer)
        others = _other_models(config, plan, policy, load)
        file.check(generation_identity(policy, **others), texts, dataset.date)
        rows = [example.row for example in dataset.examples]
        done = sum(row in file.prompts for row in rows)
        if texts.keys() <= file.prompts.keys():
            say(console, f"nothing to do: {file.path} has responses to all {done} prompts")
            return
        if done:
            say(console, f"{file.path} has responses to {done} of {len(rows)} prompts; continuing")
        decoder = prepare(policy, plan, mesh, consume=True, **others)
        _generate(decoder, dataset, texts, file, config.batch_size, console)
    say(console, f"{file.responses} responses: {file.path}")


def _check(config: GenerateConfig) -> DecodePlan:
    """Interprets the options, and refuses what can be seen to be wrong before anything is loaded."""
    plan = interpret(config.decode, len(config.pairs))
    if config.batch_size < 1:
        raise InputError(f"--batch_size {config.batch_size}: expected at least 1 prompt per batch")
    if config.reference and not plan.needs_reference:
        raise InputError(
            f"--reference {config.reference} has no effect with method {config.decode.method} and this objective; set "
            "--decode.report_reference true, or an objective that reads it (--decode.objective implicit_reward)"
        )
    if (config.prompt is None) == (config.data.eval is None):
        raise InputError("give either --prompt TEXT or --data.eval FILE (a file with a prompt column)")
    return plan


def _prompts(config: GenerateConfig, policy: LoadedModel, console: Console) -> Dataset:
    """Reads the prompts, and reports what was dropped and truncated."""
    data, vocab = config.data, {"vocabulary": policy.model.config.vocab_size}
    if config.prompt is None:
        source = (data.eval, data.eval_split, "prompts")
        dataset = load_examples(*source, policy.tokenizer, data, data.max_eval_rows, **vocab, console=console)
        say(console, dataset.report(policy.model, config.decode.max_new_tokens))
        return dataset
    records, bad = prompt_records([{data.prompt: config.prompt}], data, "--prompt")
    dataset = make_dataset(records, bad, "--prompt", policy.tokenizer, data, **vocab)
    if dataset.examples[0].prompt_truncated:
        limit = f"{data.prompt_limit} tokens (data.max_prompt_length)"
        say(console, f"--prompt is longer than {limit}, and lost its beginning")
    new_tokens = config.decode.max_new_tokens
    if warning := policy.model.check_length(dataset.longest(new_tokens), f"--prompt and {new_tokens} new tokens"):
        say(console, warning)
    return dataset


def _other_models(
    config: GenerateConfig, plan: DecodePlan, policy: LoadedModel, load: Callable[[str | Path], LoadedModel]
) -> dict[str, Any]:
    """Loads what is needed beside the policy, as `prepare` takes it."""
    reference = beta = None
    if plan.needs_reference:
        reference = open_reference(policy, config.reference, config.model, load)
        beta = find_beta(policy, config.decode.beta, config.model, "--decode.beta")
    guides = [Guide(load(pair.tuned), load(pair.untuned), pair.weight) for pair in config.pairs]
    return {"reference": reference, "beta": beta, "guides": guides}


def _generate(
    decoder: Decoder,
    dataset: Dataset,
    texts: Mapping[int, str | None],
    file: GenerationsFile,
    batch_size: int,
    console: Console,
):
    """Writes and shows the missing responses, under a bar with the rate of new tokens."""
    total = len(dataset.examples)
    done = sum(example.row in file.prompts for example in dataset.examples)
    tokens, began = 0, time.perf_counter()
    with sole_writer(file.folder), file, Bar(console, "generating", total, done) as bar:
        try:
            for batch in generate_missing(decoder, dataset, texts, file, batch_size):
                for row, responses in batch:
                    _show(texts[row], responses, console)
                    tokens += sum(response.length for response in responses)
                done += len(batch)
                bar.update(done, f"{tokens / (time.perf_counter() - began):,.1f} new tokens/s")
        except Stopped:
            if done < total:  # else the signal came during the last batch, and nothing is left to do
                raise


def _show(prompt: str, responses: list[Generation], console: Console):
    console.print(Text(visible(prompt), style="dim"))
    for response in responses:
        if response.finish == "none":
            console.print(Text("no response was found", style="red"))
            continue
        end = "" if response.finished else " …"
        console.print(Text(f"[{response.score:.2f}] ", style="cyan") + Text(visible(response.text) + end))
    console.print()
