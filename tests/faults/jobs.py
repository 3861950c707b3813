"""The commands that are killed, and what they leave."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "malformed"))

from case import WORDS, Place, weights

STEPS = 12
MODEL = {"model": "policy", "compute.dtype": "float32"}
TRAINING = {
    "model": "policy",
    "data.train": "pairs.jsonl",
    "data.eval": "held_out.jsonl",
    "optimizer.learning_rate": 3e-3,
    "train.steps": STEPS,
    "train.batch_size": 4,
    "train.log_every": 2,
    "train.save_every": 2,
    "train.eval_every": 3,
    "train.keep_checkpoints": 2,
    "train.keep_best": "loss",
    "train.reference_samples": 0,
    "resume": "auto",
}
SAMPLES = {"train.reference_samples": 2, "train.show_responses": 1}
SCORING = {"model": "policy", "reference": "reference", "beta": 0.1, "data.eval": "held_out.jsonl", "batch_size": 2}
JUDGE = {"kind": "reward_model", "model": "policy", "reference": "reference", "beta": 0.1}
SEARCH = {"decode.method": "sample", "decode.return_sequences": 2, "decode.max_new_tokens": 8}
FILES = ("model", "reference", "data.train", "data.eval", "judge.model", "judge.reference", "reference.cache")


@dataclass(frozen=True)
class Job:
    """A command that is killed and goes on.

    Attributes:
        verb: Its verb.
        options: Its options; files are named within the place.
        begins: What its folder has as soon as there is something to go on from.
        result: Folder -> what it has left, as JSON by names, but for times.
        processes: How many run it together.
    """

    verb: str
    options: dict[str, Any]
    begins: str
    result: Callable[[Path], dict[str, Any]]
    processes: int = 1

    def words(self, place: Path) -> list[str]:
        """The words of the command, which writes to `run` in the place."""
        options = {name: place / value if name in FILES else value for name, value in self.options.items()}
        return [self.verb, *(f"--{name}={value}" for name, value in options.items()), f"--out={place / 'run'}"]


def prepare(place: Path):
    """Writes models and data."""
    rng = Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    given = Place(place)
    given.model().rename(place / "policy")
    given.model(tensors={name: tensor * 0.9 for name, tensor in weights().items()}).rename(place / "reference")
    for name, rows in (("pairs", 300), ("held_out", 12)):
        pairs = [{"prompt": text(2, 6), "chosen": text(1, 8), "rejected": text(1, 8)} for _ in range(rows)]
        given.rows(*pairs, name=f"{name}.jsonl")


def trained(run: Path) -> dict[str, Any]:
    """What a training run has left: parameters and optimizer state to the bit, metrics, and summary."""
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    result: dict[str, Any] = {"newest checkpoint": steps[-1]}
    for part in ("params", "opt_state"):
        result[part] = arrays(run / "checkpoints" / str(steps[-1]) / part)
    lines = [_without_times(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result |= {f"metrics.jsonl line {number}": line for number, line in enumerate(lines, start=1)}
    result |= {
        f"summary.json {k}": v for k, v in _without_times(json.loads((run / "summary.json").read_text())).items()
    }
    for name in ("best.json", "reference_samples.jsonl", "responses.jsonl"):
        if (run / name).exists():
            result[name] = (run / name).read_text()
    return result | left_over(run)


def _without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    times = ("seconds", "peak_memory_bytes")
    return {name: value for name, value in metrics.items() if not name.startswith("perf/") and name not in times}


def arrays(folder: Path) -> dict[str, str]:
    """The arrays in a folder that Orbax wrote: name of each piece -> digest of its bytes."""
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    return {key.decode(): hashlib.sha256(store.read(key).result().value).hexdigest() for key in store.list().result()}


def generated(run: Path) -> dict[str, Any]:
    """What `generate` has left."""
    lines = (run / "generations.jsonl").read_text().splitlines()
    return {f"generations.jsonl line {number}": line for number, line in enumerate(lines, start=1)} | left_over(run)


def scored(run: Path) -> dict[str, Any]:
    """What `score` has left."""
    lines = (run / "scores.jsonl").read_text().splitlines()
    return {f"scores.jsonl line {number}": line for number, line in enumerate(lines, start=1)} | left_over(run)


def swept(run: Path) -> dict[str, Any]:
    """What `sweep` has left."""
    result = {name: (run / name).read_text() for name in ("sweep.json", "comparisons.jsonl", "sweep.identity.json")}
    for path in sorted(run.rglob("generations.jsonl")):
        result[str(path.relative_to(run))] = path.read_text()
    return result | left_over(run)


def left_over(run: Path) -> dict[str, Any]:
    """Files that are none of the result: there should be none."""
    paths = [path.relative_to(run) for path in run.rglob("*")]
    temporary = [str(path) for path in paths if ".tmp" in path.name or "partial" in path.name]
    return {"left over": sorted(temporary)}


JOBS = {
    "dpo": Job("dpo", TRAINING | SAMPLES, "checkpoints", trained),
    "lora": Job("dpo", TRAINING | {"lora.rank": 2}, "checkpoints", trained),
    "cached": Job("dpo", TRAINING | {"reference.mode": "cached", "reference.cache": "caches"}, "checkpoints", trained),
    "two-processes": Job(
        "dpo",
        TRAINING | {"mesh.fsdp": 2, "mesh.min_shard_size": 64, "mesh.multi_process": "true"},
        "checkpoints",
        trained,
        processes=2,
    ),
    "generate": Job(
        "generate",
        {"model": "policy", "data.eval": "held_out.jsonl", "batch_size": 2} | SEARCH,
        "generations.jsonl",
        generated,
    ),
    "score": Job("score", SCORING, "scores.partial.jsonl", scored),
    "sweep": Job(
        "sweep",
        SCORING
        | {"widths": "[2]", "seeds": "[0]", "max_new_tokens": 8}
        | {f"judge.{name}": value for name, value in JUDGE.items()},
        "policy",
        swept,
    ),
}
