"""What is written to the cloud: finished files of a folder of this machine."""

import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from threading import Event, Thread

from filelock import FileLock, Timeout
from rich.console import Console

from qstar_jax.errors import InputError
from qstar_jax.store.cloud.copies import Copies, is_list, state_of, step_of, whole
from qstar_jax.store.cloud.place import Place, reason
from qstar_jax.store.user_cache import user_cache

INTERVAL = 15.0  # seconds between uploads

_log = logging.getLogger(__name__)


class CloudError(RuntimeError):
    """What was written could not be brought to its address."""


class Mirror:
    """A folder of this machine whose finished files are brought to an address; a context manager.

    On entry the folder holds what is at the address, and nothing else; but where only this folder has been written
    since the last upload, which failed or was cut short, it stays as it is, and its files are uploaded.

    Args:
        place: The address.
        is_shared: Whether others write there too, so that nothing is deleted, here or there: a cache.
    """

    def __init__(self, place: Place, is_shared: bool = False):
        self._place, self._is_shared = place, is_shared
        local = user_cache("cloud") / "folders" / place.scheme / place.root
        self._copies = Copies(place, place.root, local)
        self._lock = FileLock(f"{local}.lock")
        self._over = Event()
        self._thread = Thread(target=self._upload_often, name=f"upload {place.address}", daemon=True)

    def __enter__(self) -> Path:
        """Makes the folder equal to what is there.

        Raises:
            InputError: If the address cannot be opened, or another run on this machine writes there.
        """
        place, copies = self._place, self._copies
        if place.is_pattern or place.scheme.startswith("http"):
            raise InputError(f"{place}: expected a folder in which files can be written")
        copies.local.parent.mkdir(parents=True, exist_ok=True)
        place.check_bucket()
        try:
            self._lock.acquire(timeout=600 if self._is_shared else 0)
        except Timeout as error:
            raise InputError(f"{place} is being written by another run; wait for its end, or choose another") from error
        try:
            listing = place.listing(place.root)
            complete = {name: listing[name] for name in whole(listing)}
            if not self._is_shared and self._is_ahead(listing):
                wanted = {name: version for name, version in complete.items() if not copies.path(name).exists()}
            else:
                wanted = complete
                if not self._is_shared:
                    self._remove_others(complete)
            copies.download(wanted, Console())
            for name in listing.keys() - complete.keys():  # parts of checkpoints, which the next upload deletes
                copies.versions[name] = [0, 0, None]
            copies.remember()
        except BaseException:
            self._lock.release()
            raise
        if self._is_shared:
            self._lock.release()
        self._thread.start()
        return copies.local

    def __exit__(self, kind: type[BaseException] | None, *_):
        """Uploads the rest.

        Raises:
            CloudError: If that fails, and there is no other error.
        """
        self._over.set()
        self._thread.join()
        try:
            self.upload()
        except Exception as error:
            message = f"{self._place}: not complete there ({reason(error)}); all is in {self._copies.local}"
            if kind is None:
                raise CloudError(message) from error
            _log.warning(message)
        finally:
            self._lock.release()

    def upload(self):
        """Brings what is finished to the address: what a checkpoint needs before the list that makes it count."""
        copies = self._copies
        # What is complete now, and then the files beside it: lines of a log are written before the checkpoint.
        steps = [name for name in whole(self._local_files()) if step_of(name) is not None]
        local = self._local_files()
        others = [name for name in whole(local) if step_of(name) is None]
        parts = [[name for name in names if is_list(name) == lists] for names in (others, steps) for lists in (0, 1)]
        for names in parts:
            copies.upload([name for name in names if copies.path(name).exists()])
        if not self._is_shared:
            copies.delete([name for name in copies.versions if not copies.path(name).exists()])
        copies.remember()

    def _upload_often(self):
        while not self._over.wait(INTERVAL):
            try:
                self.upload()
            except Exception as error:
                _log.warning(f"{self._place}: not uploaded ({reason(error)}); it is tried again")

    def _local_files(self) -> list[str]:
        """Names of the files that may go there: no temporary ones; the oldest first, as later ones may rest on them."""
        local = self._copies.local
        if local.is_file():
            return [""]
        found = []
        for path in local.rglob("*"):
            name = path.relative_to(local).as_posix()
            is_temporary = any(part.startswith(".") or "tmp" in part.split(".") for part in name.split("/"))
            if not is_temporary and "orbax-checkpoint-tmp" not in name and path.is_file() and not path.is_symlink():
                try:
                    found.append((path.stat().st_mtime_ns, name))
                except FileNotFoundError:
                    continue
        return [name for _, name in sorted(found)]

    def _is_ahead(self, listing: dict[str, str | None]) -> bool:
        """Whether what is at the address came from this folder, which may have changed since."""
        copies = self._copies

        def is_ours(name: str) -> bool:
            recorded, version = copies.versions.get(name, [0, 0, None])[2], listing[name]
            if version is None or version == recorded:
                return version is not None
            # It may have been uploaded just before a kill, and not been written down.
            size, _ = state_of(copies.path(name))
            return version.split(" ")[-1] == str(size)

        deleted_there = [name for name in copies.versions if name not in listing and copies.path(name).exists()]
        return bool(copies.versions) and not deleted_there and all(map(is_ours, listing))

    def _remove_others(self, listing: Collection[str]):
        """Removes local files that are not in a listing, as those of a run whose folder was deleted there."""
        local = self._copies.local
        if local.is_dir():
            for path in sorted(local.rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(local).as_posix() not in listing:
                    path.unlink()
            if not any(local.iterdir()):
                shutil.rmtree(local)
        elif local.exists() and "" not in listing:
            local.unlink()
        for name in self._copies.versions.keys() - set(listing):
            del self._copies.versions[name]
