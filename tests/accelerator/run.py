"""Runs the parts of the check of an accelerator, and writes what they find into one report as it comes.

    python tests/accelerator/run.py [--tiny] [--parts machine,training] [--out FOLDER]
    python tests/accelerator/run.py --table REPORT.json [--parts training]

A part is a script that prints one JSON object per line: a record, with a name, measured numbers, and `"ok": false` and
an error where a check failed. Each part is a process of its own that is killed at its limit, so that a part that hangs
or crashes takes nothing with it. `FOLDER/report.json` is rewritten after each record; what else a part prints is in
`FOLDER/PART.log`. The exit code is 1 if a part failed. `--table` prints a report as Markdown.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TextIO

sys.path.extend(str(Path(__file__).parents[level]) for level in (0, 2))  # this repository need not be installed
from report_tables import markdown

from qstar_jax.store.files import write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# What a part can import besides its neighbours: this package, and helpers of the tests and of the benchmarks.
IMPORTABLE = (ROOT, ROOT / "tests", ROOT / "tests/benchmarks")


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: Its name in the report.
        words: Script and arguments.
        limit: Seconds after which it is killed.
    """

    name: str
    words: tuple[str, ...]
    limit: float


# The limits add up to less than eight minutes.
PARTS = (
    Part("machine", (str(HERE / "machine.py"),), 40),
    Part("correctness", (str(HERE / "correctness.py"),), 130),
    Part("training", (str(HERE / "training.py"),), 200),
    Part("decoding", (str(HERE / "decoding.py"),), 90),
)


class Report:
    """A report that is written anew whenever something is added.

    Args:
        parts: The parts that will run.
        folder: Where `report.json` is written.
        **facts: What else the report holds.
    """

    def __init__(self, parts: Sequence[Part], folder: Path, **facts: object):
        self._file, self._began = folder / "report.json", time.monotonic()
        self._parts = {part.name: {"state": "waiting", "limit_seconds": part.limit, "records": []} for part in parts}
        date = datetime.now().astimezone().isoformat(timespec="seconds")
        self._content = {"date": date, **facts, "seconds": 0.0, "parts": self._parts}
        self._save()

    def start(self, part: str):
        """Notes that a part runs."""
        self._parts[part]["state"] = "running"
        self._save()

    def add(self, part: str, record: dict):
        """Adds a record of a part."""
        self._parts[part]["records"].append(record)
        self._say(f"{part}: {record['name']}" + ("" if passed(record) else f" FAILED: {record.get('error', '')}"))
        self._save()

    def finish(self, part: str, seconds: float, error: str):
        """Notes how a part has ended; an empty error means well."""
        state = "failed" if error else "passed"
        self._parts[part] |= {"state": state, "seconds": round(seconds, 1)} | ({"error": error} if error else {})
        self._say(f"{part} {state} in {seconds:.0f} s" + (f": {error}" if error else ""))
        self._save()

    @property
    def ok(self) -> bool:
        """Whether all parts have passed."""
        return all(part["state"] == "passed" for part in self._parts.values())

    def markdown(self) -> str:
        """The report's tables."""
        return markdown(self._content)

    def _say(self, line: str):
        print(f"{time.monotonic() - self._began:4.0f} s  {line}", flush=True)

    def _save(self):
        self._content["seconds"] = round(time.monotonic() - self._began, 1)
        write_json(self._file, self._content)


def run_parts(parts: Sequence[Part], folder: Path, **facts: object) -> Report:
    """Runs parts one after the other.

    Args:
        parts: The parts.
        folder: Where the report and the logs are written.
        **facts: What else the report holds.

    Returns:
        The report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(parts, folder, **facts)
    for part in parts:
        report.start(part.name)
        start = time.monotonic()
        error = run_part(part, folder / f"{part.name}.log", partial(report.add, part.name))
        report.finish(part.name, time.monotonic() - start, error)
    return report


def run_part(part: Part, log: Path, add: Callable[[dict], None]) -> str:
    """Runs a part, and ends all processes that it has started.

    Args:
        part: The part.
        log: File for what it prints besides records.
        add: Called with each record.

    Returns:
        What went wrong; empty if nothing did.
    """
    records = []
    log.unlink(missing_ok=True)
    with log.open("a", encoding="utf-8") as file, started(part, file) as process:
        try:
            for line in lines_until(process, time.monotonic() + part.limit):
                if record := read_record(line):
                    records.append(record)
                    add(record)
                else:
                    print(line, end="", file=file, flush=True)
        except TimeoutError:
            return f"killed at its limit of {part.limit:g} seconds"
    if failed := [record["name"] for record in records if not passed(record)]:
        return f"{len(failed)} of {len(records)} records: {', '.join(failed)}"
    if process.returncode:
        code = process.returncode
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        return ": ".join([how, *log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]])
    return "" if records else "printed no record"


@contextmanager
def started(part: Part, log: TextIO) -> Iterator[subprocess.Popen]:
    """Starts a part; kills it and its children at the end."""
    path = os.pathsep.join([*map(str, IMPORTABLE), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, *part.words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # a process group of its own, which can be killed as a whole
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lines_until(process: subprocess.Popen, deadline: float) -> Iterator[str]:
    """Yields the lines that a process prints, and waits for its end; raises TimeoutError at the deadline."""
    lines = queue.SimpleQueue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (line := lines.get(timeout=max(deadline - time.monotonic(), 0))) is not None:
            yield line
        process.wait(max(deadline - time.monotonic(), 0))
    except (queue.Empty, subprocess.TimeoutExpired):
        raise TimeoutError from None


def read_record(line: str) -> dict | None:
    """Reads a record; None if the line is none. NaN and infinities become strings, which every reader of JSON takes."""
    try:
        record = json.loads(line, parse_constant=str)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "name" in record else None


def passed(record: dict) -> bool:
    """Whether the check of a record passed; measurements without one do."""
    return record.get("ok", True) is True


def main():
    """Reads the arguments, and runs the parts or prints a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="run the same in small, on any machine")
    parser.add_argument("--parts", help=f"some of {','.join(part.name for part in PARTS)}; all by default")
    parser.add_argument("--out", type=Path, help="default: the variable OUT, or runs/accelerator")
    parser.add_argument("--table", type=Path, metavar="REPORT.json", help="print this report as Markdown")
    arguments = parser.parse_args()
    names = arguments.parts.split(",") if arguments.parts else [part.name for part in PARTS]
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in PARTS)}")
    if arguments.table:
        print(markdown(json.loads(arguments.table.read_text(encoding="utf-8")), names))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part that runs, too
    parts = [part for part in PARTS if part.name in names]
    if arguments.tiny:  # a small machine may be busy with other things: time is not what is tested there
        parts = [replace(part, words=(*part.words, "--tiny=true"), limit=2 * part.limit) for part in parts]
    report = run_parts(
        parts, arguments.out or Path(os.environ.get("OUT") or ROOT / "runs/accelerator"), tiny=arguments.tiny
    )
    print(f"\n{report.markdown()}")
    sys.exit(not report.ok)


if __name__ == "__main__":
    main()
