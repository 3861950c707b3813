"""Where metrics go besides the run folder: Weights & Biases and trackio, which are called alike."""

import importlib
import json
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from qstar_jax.config import LogOptions
from qstar_jax.errors import InputError
from qstar_jax.store.files import write_json

IDENTITY = "tracked.json"  # in the run folder: by which name a tracker knows the run


def check_trackers(options: LogOptions):
    """Refuses trackers that are not installed, or have no project.

    Raises:
        InputError: If one is.
    """
    for package, project in vars(options).items():
        if project is not None and not project.strip():
            raise InputError(f"log.{package} is empty: expected the name of a project")
        if project is not None and find_spec(package) is None:
            raise InputError(f"log.{package} {project}: {package} is not installed: pip install 'qstar_jax[{package}]'")


class Trackers:
    """Sends what a run logs to the trackers that its options name; a context manager.

    Args:
        options: Project of each.
        folder: Folder of the run.
    """

    def __init__(self, options: LogOptions, folder: Path):
        self._projects = {package: project for package, project in vars(options).items() if project is not None}
        self._folder = folder
        self._runs: dict[str, Any] = {}

    def __enter__(self) -> "Trackers":
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_):
        """Waits until everything is sent; a run that failed or was stopped is marked so, where a tracker has a mark."""
        for package, run in self._runs.items():
            run.finish(**({"exit_code": int(kind is not None)} if package == "wandb" else {}))

    def start(self, config: Mapping[str, Any], step: int):
        """Opens a run in each project, on the first process: that of this folder if it goes on, else a new one.

        Nothing is written into the folder unless all begin.

        Args:
            config: All options of the run.
            step: Steps done already.

        Raises:
            InputError: If a tracker cannot begin, for instance because nobody is logged in.
        """
        if not self._projects or jax.process_index() != 0:
            return
        path = self._folder / IDENTITY
        known = step > 0 and path.exists()
        identity = json.loads(path.read_text(encoding="utf-8"))["id"] if known else uuid.uuid4().hex[:8]
        for package, project in self._projects.items():
            name = self._folder.absolute().name
            own = (
                {"id": identity, "name": name, "dir": str(self._folder), "allow_val_change": True}
                if package == "wandb"
                else {"name": f"{name}-{identity}", "embed": False}
            )
            try:
                tracker = importlib.import_module(package)
                self._runs[package] = tracker.init(project=project, config=dict(config), resume="allow", **own)
            except Exception as error:  # each has types of its own, of which some appear only when it cannot log in
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise InputError(f"log.{package} {project}: {package} does not begin ({reason})") from error
        write_json(path, {"id": identity})

    def log(self, step: int, metrics: Mapping[str, float]):
        """Sends a line of metrics."""
        for run in self._runs.values():
            run.log(dict(metrics), step=step)

    def summarize(self, summary: Mapping[str, float | str]):
        """Sends the summary of a complete run: as what it is, or as metrics in trackio, which knows no summaries."""
        for package, run in self._runs.items():
            if package == "wandb":
                run.summary.update(dict(summary))
            else:
                run.log({f"summary/{name}": value for name, value in summary.items()}, step=int(summary["steps"]))
