"""The policy's responses to a few fixed prompts, at every evaluation of a run: numbers do not say how a model talks."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from qstar_jax.console import one_line, say
from qstar_jax.data.loading import Dataset
from qstar_jax.data.ragged import Lengths
from qstar_jax.decoding.eos import eos_token_ids
from qstar_jax.models.causal_lm import Params
from qstar_jax.store.files import write_atomically
from qstar_jax.training.diagnostics.reference_samples import draw
from qstar_jax.training.plan import RunPlan
from qstar_jax.training.setup import Start

RESPONSES = "responses.jsonl"
_LONGEST = 128  # tokens
_SHOWN = 200  # characters of the response that the terminal shows


def make_responder(
    plan: RunPlan, start: Start, dataset: Dataset, mesh: Mesh, console: Console, limit: int | None = None
) -> Callable[[Params, int], None] | None:
    """Makes `(params, step)`, which writes greedy responses to the first prompts of some rows and shows one of them.

    Args:
        plan: The run.
        start: Its model.
        dataset: The rows.
        mesh: Devices.
        console: Where to show the first response.
        limit: Longest response in tokens, if it is not that of the rows.

    A resumed run keeps the lines of evaluations before the step at which it resumes.

    Returns:
        The function, which all processes call together; None where none are asked for.
    """
    count, path = plan.config.train.show_responses, plan.out / RESPONSES
    if count == 0:
        return None
    examples = [dataset.examples[i] for i in range(min(count, len(dataset.examples)))]
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    limit = min(_LONGEST, limit or int(Lengths.of(dataset.examples).actions.max()))

    def spell(ids) -> str:
        return start.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def respond(params: Params, step: int) -> None:
        responses = draw(
            start.model,
            params,
            [example.prompt for example in examples],
            mesh,
            seed=0,  # nothing is drawn at random
            rows=-(-len(examples) // shards) * shards,
            max_new_tokens=limit,
            eos_ids=eos_token_ids(start),
            temperature=0.0,
        )
        texts = [spell(response.ids) for response in responses]
        if jax.process_index() == 0:
            lines = [
                {"step": step, "row": example.row, "prompt": spell(example.prompt), "response": text}
                | {"truncated": response.truncated}
                for example, text, response in zip(examples, texts, responses, strict=True)
            ]
            _append(path, step, lines)
        say(console, f"response at step {step} to row {examples[0].row + 1}: {one_line(texts[0])[:_SHOWN]}")

    return respond


def _append(path: Path, step: int, lines: list[dict]):
    """Writes the lines of a step after those of earlier ones."""
    kept = []
    if path.exists() and step > 0:
        kept = [
            line for line in map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1]) if line["step"] < step
        ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept + lines)
    write_atomically(path, text.encode("utf-8", "surrogatepass"))
