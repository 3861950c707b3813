"""Fresh responses for `qstar select`: samples, and beam searches over steps, kept as `qstar generate` keeps its own."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from qstar_jax.config import DecodeOptions, SelectConfig
from qstar_jax.console import track
from qstar_jax.data.loading import Dataset
from qstar_jax.decoding.decoder import Decoder
from qstar_jax.decoding.generate import judge_reference, prepare
from qstar_jax.decoding.generations_file import (
    GenerationsFile,
    generate_missing,
    generation_identity,
    prompt_texts,
    read_generations,
)
from qstar_jax.decoding.options import interpret
from qstar_jax.errors import InputError
from qstar_jax.evaluation.final_answers import Extractor
from qstar_jax.evaluation.questions import Question, candidates_of, read_generated
from qstar_jax.evaluation.reply_scores import Judge
from qstar_jax.evaluation.step_search import StepSearch, compare_at_equal_tokens
from qstar_jax.evaluation.trials import distinct_prompts


def sampling_options(config: SelectConfig) -> DecodeOptions:
    """How responses are sampled."""
    return DecodeOptions(method="sample", return_sequences=config.samples, **_common(config))


def search_options(config: SelectConfig, beams: int) -> DecodeOptions:
    """How a beam search over steps finds them: prefixes compete by their implicit reward after each step."""
    return DecodeOptions(
        method="chunk",
        beams=beams,
        samples=config.step_samples,
        chunk_length=min(config.step_length, config.max_new_tokens),
        delimiters=config.step_ends,
        objective="implicit_reward",
        **_common(config),
    )


def _common(config: SelectConfig) -> dict[str, Any]:
    return {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "stop": config.stop,
        "seed": config.seed,
    }


def check_fresh(config: SelectConfig):
    """Refuses decoding options that have no meaning, and folders of other responses, before a model is loaded.

    Raises:
        InputError: If there are any.
    """
    if len(set(config.step_beams)) < len(config.step_beams):
        raise InputError(f"--step_beams {config.step_beams}: expected different widths")
    for options, name in _plans(config):
        interpret(options)
        _file(config, options, name)


def _plans(config: SelectConfig) -> list[tuple[DecodeOptions, str]]:
    searches = [(search_options(config, beams), _folder(beams)) for beams in config.step_beams]
    return [(sampling_options(config), "samples"), *searches]


def _folder(beams: int) -> str:
    return f"step-beams-{beams}"


def sample_responses(config: SelectConfig, judge: Judge, prompts: Dataset, console: Console) -> list[dict]:
    """Samples responses to every distinct prompt; an interrupted command continues.

    Returns:
        The records of generations.jsonl in the folder `samples`.
    """
    options = sampling_options(config)
    sampler = judge.policy if config.sampler == "policy" else judge.reference
    file = _file(config, options, "samples")
    return _generate(
        config,
        file,
        prompts,
        judge.policy.tokenizer,
        generation_identity(sampler),
        lambda: prepare(sampler, interpret(options), judge.mesh),
        config.samples,
        console,
    )


def search_steps(
    config: SelectConfig,
    judge: Judge,
    prompts: Dataset,
    beams: int,
    questions: Sequence[Question],
    generations: Sequence[dict],
    extract: Extractor,
    console: Console,
) -> StepSearch:
    """Searches over steps, and compares what is found with selection among as many sampled tokens.

    Args:
        config: What was asked for.
        judge: The models.
        prompts: Prompts of all questions.
        beams: Width of the search.
        questions: The samples of each question, scored.
        generations: Their records, which have their lengths.
        extract: Finds final answers.
        console: Where to show progress.
    """
    options = search_options(config, beams)
    models = {"reference": judge.reference, "beta": judge.beta}

    def make() -> Decoder:
        decoder = prepare(judge.policy, interpret(options), judge.mesh, **models)
        return decoder if config.sampler == "policy" else judge_reference(decoder)

    file = _file(config, options, _folder(beams))
    identity = generation_identity(judge.policy, **models)
    per_prompt = beams * config.step_samples
    records = _generate(config, file, prompts, judge.policy.tokenizer, identity, make, per_prompt, console)
    records = [record for record in records if record["drawn"] is not None]
    best = {found[0].row: found[0] for found in read_generated(records, config.data, extract, config.right)}
    drawn = {record["row"]: record["drawn"] for record in records}
    length_of = {(record["row"], record["rank"]): record["length"] for record in generations}
    asked = [question for question in questions if question[0].row in drawn]
    rows = [question[0].row for question in asked]
    return compare_at_equal_tokens(
        # A search that found no response is wrong, and its tokens were drawn all the same.
        np.array([row in best and best[row].correct for row in rows]),
        np.array([drawn[row] for row in rows]),
        list(map(candidates_of, asked)),
        [np.array([length_of[reply.place] for reply in question]) for question in asked],
        beams=beams,
        samples=config.step_samples,
        weight=config.weight,
        subsets=config.subsets,
        seed=config.seed,
    )


def _file(config: SelectConfig, options: DecodeOptions, name: str) -> GenerationsFile:
    """Opens the file of one way to decode; nothing is written."""
    folder = Path(config.out) / name
    settings = {"model": config.model, "reference": config.reference, "sampler": config.sampler, "out": str(folder)}
    blocks = {"decode": options, "data": config.data, "compute": config.compute, "mesh": config.mesh}
    settings |= {"pairs": [], "batch_size": config.batch_size}
    return GenerationsFile(folder, settings | {block: asdict(values) for block, values in blocks.items()})


def _generate(
    config: SelectConfig,
    file: GenerationsFile,
    prompts: Dataset,
    tokenizer: Any,
    identity: dict[str, Any],
    make: Callable[[], Decoder],
    per_prompt: int,
    console: Console,
) -> list[dict]:
    """Responds to the prompts that have no responses yet, `batch_size` responses at once."""
    dataset = distinct_prompts(prompts)
    texts = prompt_texts(dataset, tokenizer)
    file.check(identity, texts, dataset.date)
    if not texts.keys() <= file.prompts.keys():
        decoder, size = make(), max(1, config.batch_size // per_prompt)
        with file:
            batches = generate_missing(decoder, dataset, texts, file, size)
            for _ in track(console, batches, file.folder.name, -(-len(dataset.examples) // size)):
                pass
    return [record for record in read_generations(file.folder) if record["row"] in texts]
