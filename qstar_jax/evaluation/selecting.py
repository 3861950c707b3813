"""`qstar select`: reads or samples the responses to each question, scores them, and measures every way to select."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.config import SelectConfig
from qstar_jax.config.paths import recorded
from qstar_jax.config.ranges import check_ranges
from qstar_jax.config.unread import check_unread
from qstar_jax.console import say
from qstar_jax.data.loading import load_examples, read_records
from qstar_jax.data.steps import parse_delimiter
from qstar_jax.data.tokenization import Example
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.decoding.generations_file import read_generations
from qstar_jax.errors import InputError
from qstar_jax.evaluation.final_answers import Extractor, find_extractor
from qstar_jax.evaluation.fresh import check_fresh, sample_responses, search_steps
from qstar_jax.evaluation.insights.selection import Selection, choose_sizes, compute_selection
from qstar_jax.evaluation.questions import (
    Place,
    Question,
    candidates_of,
    check_right,
    read_generated,
    read_questions,
    with_scores,
)
from qstar_jax.evaluation.reply_scores import Judge, generated_examples, score_responses, selection_scores
from qstar_jax.evaluation.score import SCORES
from qstar_jax.evaluation.scored import read_scores
from qstar_jax.evaluation.step_search import StepSearch
from qstar_jax.sharding import make_mesh, use_mesh
from qstar_jax.store.identity import write_identity
from qstar_jax.store.open import load_model
from qstar_jax.store.references import find_beta, open_reference
from qstar_jax.store.user_cache import keep_programs

RESPONSES = "responses.jsonl"
_SAMPLING = ("sampler", "temperature", "top_k", "top_p", "max_new_tokens", "stop")
_SEARCHING = ("step_samples", "step_length", "step_ends")


def open_judge(config: SelectConfig, mesh: Mesh) -> Judge:
    """Opens the models whose rewards score responses.

    Raises:
        InputError: If the run has no reference or no beta, and none is named.
    """
    load = partial(load_model, compute=config.compute, mesh=mesh, mesh_options=config.mesh)
    policy = load(config.model)
    reference = open_reference(policy, config.reference, config.model, load)
    if reference.model != policy.model:
        raise InputError(f"reference {reference.source} and model {config.model} have different shapes (config.json)")
    return Judge(policy, reference, find_beta(policy, config.beta, config.model, "--beta"), mesh)


def measure_selection(config: SelectConfig, console: Console) -> Selection:
    """Measures every way to select among N responses, and writes selection.json and responses.jsonl.

    Raises:
        InputError: If options contradict each other, or something that they name cannot be used.
    """
    extract = check_options(config)
    names: dict[str, Any] = {}
    search: Sequence[StepSearch] = ()
    identity: dict[str, Any] = {}
    questions: list[Question] = []
    if config.samples is None:  # what is wrong with them is said before any model is loaded
        questions = _read(config, extract)
        _check_answers(questions, config)
        choose_sizes(list(map(candidates_of, questions)), config.sizes)
    else:
        check_right(config.data, extract, config.right)
    if config.model is not None:
        mesh = make_mesh(config.mesh)
        keep_programs()
        with use_mesh(mesh, config.compute.dtype):
            judge = open_judge(config, mesh)
            identity = {"model": judge.policy.identity(), "reference": judge.reference.identity(), "beta": judge.beta}
            questions, search = _judged(config, extract, judge, questions, console)
        reference = str(config.reference or judge.reference.source)
        names = {"model": config.model, "reference": reference, "beta": judge.beta}
        _check_answers(questions, config)
    selection = compute_selection(
        list(map(candidates_of, questions)),
        sizes=config.sizes,
        weight=config.weight,
        subsets=config.subsets,
        seed=config.seed,
        disagreements=_disagreements(questions),
        search=search,
        **names,
    )
    _write(config, selection, questions, identity)
    return selection


def check_options(config: SelectConfig) -> Extractor:
    """Refuses what can be seen to be wrong before anything is read, and makes the extractor of final answers.

    Raises:
        InputError: If an option is missing, has no effect, or contradicts another.
    """
    check_ranges(config)
    if config.data.eval is None:
        raise InputError("--data.eval is missing: name the file of questions, with or without responses")
    sources = [name for name in ("samples", "generations", "scores") if getattr(config, name) is not None]
    if len(sources) > 1:
        raise InputError(f"--{sources[0]} and --{sources[1]} are two sources of responses or scores; leave one out")
    if config.scores and config.model:
        raise InputError(f"--scores {config.scores} holds the scores already; leave --model out, or --scores")
    if config.samples is not None and config.samples < max(2, *(config.sizes or [2])):
        raise InputError(f"--samples {config.samples}: expected at least two per question, and the largest of --sizes")
    _check_unread(config, config.model is not None, ("reference", "beta"), "--model")
    _check_unread(config, config.model is not None, ("samples",), "--model, whose responses are sampled")
    _check_unread(config, config.samples is not None, (*_SAMPLING, "step_beams"), "--samples")
    _check_unread(config, bool(config.step_beams), _SEARCHING, "--step_beams")
    _check_unread(config, config.model is not None, ("data.step_delimiter",), "--model, which scores steps")
    scored = [name for name in ("model", "scores", "generations") if getattr(config, name) is not None]
    _check_unread(
        config, bool(scored), ("weight",), "scores, by which votes weigh: name --model, --scores or --generations"
    )
    extract = find_extractor(config.final_answer, config.pattern, options=("--final_answer", "--pattern"))
    parse_delimiter(config.data.step_delimiter)
    if config.samples is not None:
        if config.right is None:
            raise InputError("--right is missing: fresh responses have no labels; name the column of the right answer")
        check_fresh(config)
    return extract


def _check_unread(config: SelectConfig, is_read: bool, names: Sequence[str], needs: str):
    if not is_read:
        check_unread(config, SelectConfig(out=config.out), names, f"without {needs}")


def _read(config: SelectConfig, extract: Extractor) -> list[Question]:
    """Reads responses, and their scores where a file has them."""
    if config.generations is not None:
        return read_generated(_generations(config.generations), config.data, extract, config.right)
    questions = read_questions(config.data, extract, config.right)
    if config.scores is None:
        return questions
    path = Path(config.scores) / SCORES
    if not path.is_file():
        raise InputError(f"{path}: no such file; --scores expects a folder that `qstar score --answers single` wrote")
    responses = read_scores(path)
    if any(response.role != "answer" for response in responses):
        raise InputError(f"{path} holds scores of pairs; expected those of single responses (--answers single)")
    scores = selection_scores(responses, [(response.row, 0) for response in responses])
    scored = with_scores(questions, scores)
    if not scored:
        raise InputError(f"{path} has no score for any row of {config.data.eval}; expected scores of the same rows")
    return scored


def _judged(
    config: SelectConfig, extract: Extractor, judge: Judge, questions: list[Question], console: Console
) -> tuple[list[Question], Sequence[StepSearch]]:
    """Scores the responses that were read, or samples some; searches for others where that was asked for."""
    data, tokenizer = config.data, judge.policy.tokenizer
    vocab = {"vocabulary": judge.policy.model.config.vocab_size, "eos_ids": eos_token_ids(judge.policy)}
    kind = "prompts" if config.samples or config.generations else "completions"
    dataset = load_examples(
        data.eval, data.eval_split, kind, tokenizer, data, data.max_eval_rows, **vocab, console=console
    )
    say(console, dataset.report(judge.policy.model, config.max_new_tokens if config.samples else 0))
    rows, _, _ = read_records(data.eval, data.eval_split, kind, data, data.max_eval_rows)

    def score(questions: list[Question], examples: Sequence[Example], places: Sequence[Place]) -> list[Question]:
        responses = replace(dataset, examples=examples)
        scored = score_responses(judge, responses, rows, data, batch_size=config.batch_size, console=console)
        return with_scores(questions, selection_scores(scored, places))

    if kind == "completions":
        places = [(example.row, 0) for example in dataset.examples]
        return score(questions, dataset.examples, places), ()
    if config.samples is None:
        generations = _generations(config.generations)
    else:
        generations = sample_responses(config, judge, dataset, console)
        questions = read_generated(generations, data, extract, config.right)
    questions = score(questions, *generated_examples(generations, dataset, tokenizer))
    search = [
        search_steps(config, judge, dataset, beams, questions, generations, extract, console)
        for beams in config.step_beams
    ]
    return questions, search


def _generations(folder: str) -> list[dict]:
    path = Path(folder) / "generations.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; --generations expects a folder that `qstar generate` wrote")
    return read_generations(Path(folder))


def _check_answers(questions: Sequence[Question], config: SelectConfig):
    """Refuses files in which no response has a final answer: every vote would be empty."""
    texts = [reply.text for question in questions for reply in question]
    if not any(reply.answer is not None for question in questions for reply in question):
        raise InputError(
            f"no response has a final answer by --final_answer {config.final_answer}; the first ends with "
            f"{texts[0][-60:]!r}; choose another way (marked, hash, boxed, number), or give --pattern"
        )


def _disagreements(questions: Sequence[Question]) -> int | None:
    """How many labels differ from what the final answers say; None without labels."""
    labelled = [reply for question in questions for reply in question if reply.labelled is not None]
    return sum(reply.labelled != reply.correct for reply in labelled) if labelled else None


def _write(config: SelectConfig, selection: Selection, questions: Sequence[Question], identity: dict[str, Any]):
    """Writes the record, who made it, and the responses that it is about."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "selection.png").unlink(missing_ok=True)
    with (out / RESPONSES).open("w", encoding="utf-8") as file:
        for number, question in enumerate(questions):
            for reply in question:
                file.write(json.dumps({"question": number, **reply.to_json()}, ensure_ascii=False) + "\n")
    write_identity(out / "selection.json", {"options": recorded(config), **identity})
    selection.write(out)
