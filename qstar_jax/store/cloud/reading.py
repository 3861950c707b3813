"""What is read from the cloud: copied into the user's cache, where what has not changed stays."""

import json
import logging
import re
from collections.abc import Collection
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from qstar_jax.errors import InputError
from qstar_jax.store.checkpoints import BASE, BEST, DAMAGED, REFERENCE, STEPS
from qstar_jax.store.cloud.copies import Copies, step_of, whole
from qstar_jax.store.cloud.place import Place
from qstar_jax.store.user_cache import user_cache

_UNREAD = ("opt_state", "tensorboard", "wandb", "profile", DAMAGED)  # folders of a run that only its resumption needs
_PART_OF_A_RUN = re.compile(rf"(.+/.+)/({STEPS}(?:/\d+)?|{REFERENCE}|{BASE})")

_log = logging.getLogger(__name__)


def copy(place: Place) -> Path:
    """Copies what is to be read, except for what is here already.

    Of a run, these are its newest checkpoint and the best one, or the one that is named, without the optimizer's state.

    Returns:
        The copy.

    Raises:
        InputError: If there is nothing, or it cannot be read.
    """
    root, part = place.root, ""
    if place.is_pattern:
        root, part = re.fullmatch(r"([^*?\[]*)/(.*)", place.root, re.DOTALL).groups()
    elif (of_run := _PART_OF_A_RUN.fullmatch(root)) and place.has_file(f"{of_run[1]}/config.yaml"):
        root, part = of_run.groups()
    local = user_cache("cloud") / "copies" / place.scheme / root
    local.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{local}.lock"):
        copies, listing = Copies(place, root, local), place.listing(root)
        if not listing:
            place.check_bucket()
            raise InputError(f"{place}: there is nothing")
        console = Console()
        for name in copies.versions.keys() - listing.keys():  # deleted there
            copies.path(name).unlink(missing_ok=True)
            del copies.versions[name]
        needed = whole(listing)
        if len(needed) < len(listing):
            _log.warning(f"{place}: holds a checkpoint that is not complete, which is not read")
        if "config.yaml" in listing:  # a run
            needed = [name for name in needed if not set(_UNREAD) & set(name.split("/")[:-1])]
        steps = {name: step_of(name) for name in needed}
        copies.download({name: listing[name] for name in needed if steps[name] is None}, console)
        wanted = _wanted(part, {step for step in steps.values() if step is not None}, copies.path(BEST))
        copies.download({name: listing[name] for name in needed if steps[name] in wanted}, console)
        copies.remember()
    return local / part if part else local


def _wanted(part: str, steps: Collection[int], best: Path) -> set[int]:
    """Which checkpoints are read: the one that is named, or the newest and the best."""
    if number := re.fullmatch(rf"{STEPS}/(\d+)", part):
        return {int(number[1])}
    named = {json.loads(best.read_text(encoding="utf-8"))["step"]} if best.is_file() else set()
    return {max(steps), *named} if steps else set()
