"""A first start on a file of pairs, a second one, and the batches of steps, each start in a process of its own.

    python tests/benchmarks/data_starts.py PAIRS.jsonl FOLDER [--repeat N] [--code CHECKOUT]

FOLDER has a tokenizer. Prints JSON. `--repeat` makes a file of N rows out of the given ones, each with its number
before its prompt; `--code` measures another checkout of qstar_jax, an older one for instance.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

ROOT = Path(__file__).parents[2]


def one_start(file: str, tokenizer: str, batch_size: int) -> dict[str, Any]:
    """Loads the pairs and makes batches, and says how long it took and what memory it needed."""
    from worker import process_peak_bytes

    from qstar_jax.config import DataOptions
    from qstar_jax.data.feeder import Feeder
    from qstar_jax.data.loading import load_examples
    from qstar_jax.sharding import make_mesh
    from qstar_jax.store.hub import read_tokenizer

    mesh, options, tokens = make_mesh(), DataOptions(), read_tokenizer(Path(tokenizer))
    before, start, used = process_peak_bytes(), time.perf_counter(), time.process_time()
    dataset = load_examples(file, "train", "preferences", tokens, options)
    loaded, used = time.perf_counter() - start, time.process_time() - used
    peak = process_peak_bytes()
    summary = dataset.summary
    feeder = Feeder(dataset, batch_size, mesh, options, "train.batch_size")
    feeder._make_step(0, 0)
    start, busy = time.perf_counter(), time.process_time()
    for step in range(1, 11):
        feeder._make_step(0, step)
    return {
        "seconds": loaded,
        "rows_per_second": len(dataset.examples) / loaded,
        "processor_seconds": used,
        "peak_gib": peak / 2**30,
        "of_which_before_loading_gib": before / 2**30,
        "milliseconds_per_batch": (time.perf_counter() - start) / 10 * 1000,
        "processor_milliseconds_per_batch": (time.process_time() - busy) / 10 * 1000,
        "summary": summary,
    }


def main(
    file: Path,
    tokenizer: Path,
    repeat: int = 0,
    batch_size: int = 1024,
    code: Path = ROOT,
    once: bool = False,
):
    """Measures two starts on the same pairs.

    Args:
        file: Pairs, in JSON lines.
        tokenizer: Folder with a tokenizer.
        repeat: Rows of the file that is made out of them; 0: the file itself.
        batch_size: Pairs per batch.
        code: Checkout of qstar_jax that is measured.
        once: Measure one start, in this process.
    """
    if once:
        print(json.dumps(one_start(str(file), str(tokenizer), batch_size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if repeat:
            file = repeated(file, repeat, Path(folder) / "pairs.jsonl")
        words = [sys.executable, __file__, str(file), str(tokenizer), f"--batch_size={batch_size}", "--once=true"]
        path = os.pathsep.join([str(code), str(Path(__file__).parent)])
        variables = os.environ | {"PYTHONPATH": path, "HF_DATASETS_CACHE": folder, "JAX_PLATFORMS": "cpu"}
        starts = [json.loads(subprocess.check_output(words, env=variables).splitlines()[-1]) for _ in range(2)]
        kept = sum(path.stat().st_size for path in Path(folder).rglob("examples.arrow"))
        print(json.dumps({"first": starts[0], "second": starts[1], "kept_gib": kept / 2**30}, indent=2))


def repeated(file: Path, rows: int, target: Path) -> Path:
    """Writes `rows` rows, which differ in their prompts."""
    pairs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as out:
        for number in range(rows):
            pair = pairs[number % len(pairs)]
            out.write(json.dumps(pair | {"prompt": f"[{number}] {pair['prompt']}"}) + "\n")
    return target


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
