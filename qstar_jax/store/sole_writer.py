"""One run for each folder: a second one is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental.multihost_utils import broadcast_one_to_all

from qstar_jax.errors import InputError
from qstar_jax.store.files import missing_folders, remove_empty


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds a folder against other runs, which the operating system ends with the process, however that ends.

    It is made if it is missing, and removed again if it stays empty. All processes of a job must call this together.

    Raises:
        InputError: If another run holds it.
    """
    lock, is_free, made = None, True, []
    if jax.process_index() == 0:
        made = missing_folders(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            is_free = False
        except NotImplementedError:  # a file system without locks
            lock = None
    if jax.process_count() > 1:
        is_free = bool(broadcast_one_to_all(np.bool_(is_free)))
    if not is_free:
        raise InputError(f"{folder} is being written by another run; wait for its end, or choose another --out")
    try:
        yield
    finally:
        if lock:
            (folder / ".lock").unlink(missing_ok=True)  # while it is held
            lock.release()
        remove_empty(made)
