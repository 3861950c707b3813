"""Beams and samples of this library beside transformers' `generate` and Tunix's sampler, on the same prompts, in turn.

    python tests/benchmarks/beam_vs_hf.py --model FOLDER [--prompt_tokens 64] [--beams '[1, 5, 10]'] [--samples 8]

Each library runs in its own long-lived process; they take turns for several rounds, and medians count. Prompts are
random tokens of equal length, and no token ends a response, so all libraries generate equally many tokens. Prints
JSON: new tokens per second (of the best response per prompt, or of all samples), peak memory, ratios, whether the
responses agree, and how far this library is from the limits of the processor. Extra `parity`.

Tunix has dependencies of its own, so it runs only if asked for, in an environment of its own:

    python -m venv TUNIX && TUNIX/bin/pip install google-tunix==0.1.7 jax==0.10.2 jsonargparse
    python tests/benchmarks/beam_vs_hf.py --model FOLDER --libraries '[hf, tunix, ours]' --tunix_python TUNIX/bin/python
"""

import json
import os
import statistics
import sys
from pathlib import Path

from jsonargparse import auto_cli
from worker import Worker

HERE = Path(__file__).parent


def main(
    model: str,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    batch: int = 4,
    beams: list[int] = [1, 5, 10],  # noqa: B006
    samples: int = 8,
    rounds: int = 3,
    libraries: list[str] = ["hf", "ours"],  # noqa: B006
    threads: int = 2,
    tunix_python: str = "",
):
    """Measures the libraries in turn.

    Args:
        model: Hugging Face folder.
        prompt_tokens: Length of each prompt.
        new_tokens: Length of each answer.
        batch: Prompts at once.
        beams: Widths of beam search; 1 is greedy decoding.
        samples: Samples per prompt; 0: none.
        rounds: Turns of each library.
        libraries: hf, tunix, ours.
        threads: Cores that a library may use.
        tunix_python: Interpreter of the environment that has google-tunix.
    """
    if "tunix" in libraries and not tunix_python:
        sys.exit("tunix needs --tunix_python, the interpreter of an environment that has google-tunix")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # children inherit it
    pythons = {"tunix": str(Path(tunix_python).absolute())}  # workers run in the root of the repository
    settings = [f"beams {count}" for count in sorted(beams)] + ([f"sample {samples}"] if samples else [])
    common = ["--model", str(Path(model).absolute()), "--batch", str(batch), "--settings", json.dumps(settings)]
    common += ["--prompt_tokens", str(prompt_tokens), "--new_tokens", str(new_tokens)]
    more = {"hf": ["--threads", str(threads)]}
    workers = {
        name: Worker([str(HERE / f"beam_{name}.py"), *common, *more.get(name, [])], pythons.get(name, sys.executable))
        for name in libraries
    }
    turns = {setting: {name: [] for name in libraries} for setting in settings}
    for _ in range(rounds):
        for setting in settings:
            for name, worker in workers.items():
                turns[setting][name].append(worker.ask(setting))
    closing = {name: worker.ask("stop") for name, worker in workers.items()}
    result = {"model": Path(model).name, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch}
    result["versions"] = {name: worker.ready["versions"] for name, worker in workers.items()}
    for setting in settings:
        result[setting] = {name: speed_and_memory(turns[setting][name]) for name in libraries}
        if "ours" in libraries:
            result[setting] |= ratios(result[setting], libraries)
            result[setting]["ours"] |= steps(turns[setting]["ours"], closing["ours"]["limits"][setting], new_tokens)
            result[setting] |= same_answers(setting, workers)
    if "ours" in libraries:
        counts = [turn["compilations"] for setting in settings for turn in turns[setting]["ours"]]
        result["recompilations"] = max(counts) - workers["ours"].ready["compilations"]
        result["read_gigabytes_per_second"] = closing["ours"]["read_gigabytes_per_second"]
        seconds = {count: result[f"beams {count}"]["ours"]["step_seconds"] for count in sorted(beams)}
        narrow = min(seconds)
        # 1 if K beams take K times as long as one; below, if beams share work.
        result["step_time : linear in K"] = {k: s / seconds[narrow] * narrow / k for k, s in seconds.items()}
    print(json.dumps(result, indent=2))


def speed_and_memory(turns: list[dict]) -> dict[str, float]:
    return {
        "tokens_per_second": statistics.median(turn["tokens"] / turn["seconds"] for turn in turns),
        # What earlier turns have left behind counts too, so the least of them is meant.
        "peak_memory_gib": min(turn["peak_memory_bytes"] for turn in turns) / 2**30,
    }


def ratios(of: dict[str, dict], libraries: list[str]) -> dict[str, dict]:
    return {
        f"ours : {name}": {
            "speed": of["ours"]["tokens_per_second"] / of[name]["tokens_per_second"],
            "memory": of["ours"]["peak_memory_gib"] / of[name]["peak_memory_gib"],
        }
        for name in libraries
        if name != "ours"
    }


def steps(turns: list[dict], limits: dict, new_tokens: int) -> dict[str, float]:
    """Time of a step, without the prompt's computation, and its share of what is possible."""
    seconds = statistics.median(turn["seconds"] for turn in turns)
    step = (seconds - limits["prefill_seconds"]) / (new_tokens - 1)
    return {"step_seconds": step, "share_of_floor": limits["floor_step_seconds"] / step, **limits}


def same_answers(setting: str, workers: dict[str, Worker]) -> dict[str, dict[str, float]]:
    """Share of prompts to which another library gives the same best answer, so that all do the same work.

    Tunix computes one more token than it returns, and its best beam is the best with that one.
    """
    answers = {name: worker.ready["answers"].get(setting) for name, worker in workers.items()}
    if answers["ours"] is None:
        return {}
    equal = {
        name: sum(a == b for a, b in zip(answers["ours"], found, strict=True)) / len(found)
        for name, found in answers.items()
        if name != "ours"
    }
    return {"same_answers": equal}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
