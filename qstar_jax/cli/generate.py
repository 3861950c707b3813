"""`qstar generate`."""

import json
from dataclasses import asdict
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from qstar_jax.config import GenerateConfig
from qstar_jax.data.loading import load_examples
from qstar_jax.data.preferences import prompt_records
from qstar_jax.data.tokenization import Example, tokenize
from qstar_jax.decoding.generate import check_options, generate
from qstar_jax.errors import InputError
from qstar_jax.loading import load_model
from qstar_jax.sharding import make_mesh


def run(config: GenerateConfig):
    """Answers prompts; writes generations.jsonl."""
    console = Console()
    check_options(config.decode)
    if config.batch_size < 1:
        raise InputError(f"--batch_size {config.batch_size}: expected at least 1 prompt at once")
    mesh = make_mesh(config.mesh)
    records = []
    with jax.set_mesh(mesh), Progress(console=console, disable=not console.is_terminal) as progress:
        loaded = load_model(config.model, config.compute, mesh, config.mesh)
        examples = _prompts(config, loaded.tokenizer)
        task = progress.add_task("generating", total=len(examples))
        size = min(config.batch_size, len(examples))
        for start in range(0, len(examples), size):
            batch = examples[start : start + size]
            prompts = [example.prompt for example in batch]
            filled = prompts + prompts[:1] * (size - len(batch))  # one compiled shape serves the last batch too
            # strict=False: answers to prompts that only fill up the batch are left aside
            for example, answers in zip(
                batch, generate(loaded, filled, config.decode, mesh, seed_offset=start), strict=False
            ):
                prompt = loaded.tokenizer.decode(example.prompt, skip_special_tokens=False)
                _show(prompt, answers, console)
                records += [
                    {"row": example.row, "rank": rank, "prompt": prompt, **asdict(answer)}
                    for rank, answer in enumerate(answers)
                ]
                progress.advance(task)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "generations.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    console.print(f"{len(records)} answers: {out / 'generations.jsonl'}", markup=False, highlight=False, soft_wrap=True)


def _prompts(config: GenerateConfig, tokenizer) -> list[Example]:
    if (config.prompt is None) == (config.data.eval is None):
        raise InputError("give either --prompt TEXT or --data.eval FILE (a file with a prompt column)")
    if config.prompt is None:
        data = config.data
        return load_examples(data.eval, data.eval_split, "prompts", tokenizer, data, data.max_eval_rows).examples
    records, _ = prompt_records([{config.data.prompt: config.prompt}], config.data, "--prompt")
    examples, dropped = tokenize(records, tokenizer, config.data)
    if not examples:
        raise InputError(f"--prompt {config.prompt!r} cannot be used ({', '.join(dropped)})")
    return examples


def _show(prompt: str, answers: list, console: Console):
    console.print(Text(prompt, style="dim"))
    for answer in answers:
        end = "" if answer.finished else " …"
        console.print(Text(f"[{answer.logp:.2f}] ", style="cyan") + Text(answer.text + end))
    console.print()
