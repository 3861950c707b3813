"""Copies of files elsewhere, and which versions of them they are."""

import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from rich.console import Console

from qstar_jax.console import track
from qstar_jax.errors import InputError
from qstar_jax.store.checkpoints import BASE, REFERENCE, STEPS
from qstar_jax.store.checksums import LISTS
from qstar_jax.store.cloud.place import Place, reason, version_of
from qstar_jax.store.files import write_atomically
from qstar_jax.store.user_cache import user_cache

# Arrays and description of a checkpoint, and the list that makes it count.
_CHECKPOINT = re.compile(
    rf"(?:.*/)?(?:{STEPS}/\d+|{REFERENCE}|{BASE})/(?=params/|opt_state/|ref_params/|description/|{LISTS})"
)
_THREADS = 8
_MOMENT = 1.0  # seconds that copying takes before there is a bar


class Copies:
    """Files of a place that are here, and which versions they are: written down beside the cache.

    Args:
        place: Where they are from.
        root: The root of the place, of which `local` is the copy.
        local: The folder.
    """

    def __init__(self, place: Place, root: str, local: Path):
        self.place, self.root, self.local = place, root, local
        name = sha256(f"{local}\n{place.address}".encode()).hexdigest()[:24]
        self._file = user_cache("cloud") / "versions" / f"{name}.json"
        try:
            self.versions: dict[str, list] = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.versions = {}

    def path(self, name: str) -> Path:
        """The copy of a file."""
        return self.local / name if name else self.local

    def address(self, name: str) -> str:
        """The original of a file, without its scheme."""
        return f"{self.root}/{name}" if name else self.root

    def download(self, listing: dict[str, str | None], console: Console | None = None):
        """Downloads the files of a listing whose copies are not of that version.

        Raises:
            InputError: If one cannot be read.
        """

        def get(name: str):
            path = self.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                self.place.files.get_file(self.address(name), str(part))
                os.replace(part, path)
            except Exception as error:
                part.unlink(missing_ok=True)
                raise InputError(f"{self.place}: {name or 'it'} is not read ({reason(error)})") from error
            self.versions[name] = [*state_of(path), listing[name]]

        self._each(get, [name for name in listing if not self.is_current(name, listing[name])], console)

    def upload(self, names: Sequence[str]):
        """Uploads those of some files that have changed since."""

        def put(name: str):
            state = state_of(self.path(name))
            try:
                self.place.files.put_file(str(self.path(name)), self.address(name))
            except FileNotFoundError:
                if self.path(name).exists():
                    raise
                return  # deleted meanwhile
            self.place.files.invalidate_cache()
            self.versions[name] = [*state, version_of(self.place.files.info(self.address(name)))]

        self._each(put, [name for name in names if self.versions.get(name, [])[:2] != state_of(self.path(name))])

    def delete(self, names: Sequence[str]):
        """Deletes originals, lists of checksums first."""
        for name in sorted(names, key=lambda name: not is_list(name)):
            with suppress(FileNotFoundError):
                self.place.files.rm_file(self.address(name))
            self.versions.pop(name, None)

    def is_current(self, name: str, version: str | None) -> bool:
        """Whether the copy of a file is what was copied, and of that version."""
        return version is not None and self.versions.get(name) == [*state_of(self.path(name)), version]

    def remember(self):
        """Writes the versions down."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, json.dumps(self.versions).encode())

    def _each(self, work: Callable[[str], None], names: Sequence[str], console: Console | None = None):
        with ThreadPoolExecutor(_THREADS) as pool:
            done = pool.map(work, names)
            for _ in track(console, done, f"copying {self.place.address}", len(names), after=_MOMENT):
                pass


def whole(names: Collection[str]) -> list[str]:
    """Leaves out the files of checkpoints that have no list of checksums (yet)."""
    folders = {name: match[0] for name in names if (match := _CHECKPOINT.match(name))}
    complete = {folder for name, folder in folders.items() if is_list(name)}
    return [name for name in names if name not in folders or folders[name] in complete]


def is_list(name: str) -> bool:
    """Whether a file is a list of checksums."""
    return name.rpartition("/")[2].startswith(LISTS)


def step_of(name: str) -> int | None:
    """The step of the checkpoint in a run that a file belongs to."""
    match = re.match(rf"{STEPS}/(\d+)/", name)
    return int(match[1]) if match else None


def state_of(path: Path) -> list[int]:
    """Size and time of a file; zeros if there is none."""
    try:
        status = path.stat()
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]
