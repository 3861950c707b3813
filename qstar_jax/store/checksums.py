"""Checksums of a checkpoint's files: Orbax (0.12.8) has none of the values, and restores flipped bits as they are.

Each process of a job reads, and answers for, its share of the files.
"""

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from qstar_jax.store.files import write_atomically

LISTS = "_checksums."  # files _checksums.PROCESS-of-PROCESSES.json: path -> [bytes, CRC-32]
_BLOCK = 2**22


def write_checksums(folder: Path):
    """Writes down the files of a checkpoint that is complete; every process does."""
    names = _files(folder)[jax.process_index() :: jax.process_count()]
    content = json.dumps(dict(zip(names, _sums(folder, names), strict=True)))
    write_atomically(folder / f"{LISTS}{jax.process_index()}-of-{jax.process_count()}.json", content.encode())


def are_listed(folder: Path) -> bool:
    """Whether all processes have written down the files of a checkpoint."""
    lists = [path.name for path in folder.glob(f"{LISTS}*.json")]
    return bool(lists) and all(name.endswith(f"-of-{len(lists)}.json") for name in lists)


def find_damage(folder: Path, parts: Sequence[str] = ("",)) -> str | None:
    """Compares a checkpoint with what was written; all processes of a job must call this together.

    Args:
        folder: The checkpoint.
        parts: Names of the folders in it that matter; all by default.

    Returns:
        The first difference; None if there is none, or nothing was written down, as by an earlier version.
    """
    damage = _damage(folder, parts)
    if jax.process_count() == 1:
        return damage
    found = np.flatnonzero(process_allgather(np.array(damage is not None)))
    return damage or (f"as process {found[0]} found" if len(found) else None)


def _damage(folder: Path, parts: Sequence[str]) -> str | None:
    try:
        lists = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{LISTS}*.json"))]
        recorded = {name: tuple(sums) for one in lists for name, sums in one.items() if name.startswith(tuple(parts))}
        names = sorted(recorded)[jax.process_index() :: jax.process_count()]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            return f"{missing[0]} is missing"
        for name, (size, crc) in zip(names, _sums(folder, names), strict=True):
            if size != recorded[name][0]:
                return f"{name} has {size:,} bytes, and {recorded[name][0]:,} were written"
            if crc != recorded[name][1]:
                return f"{name} has other bytes than were written"
    except OSError as error:
        return str(error)
    except (ValueError, TypeError, AttributeError, IndexError):
        return "its list of checksums is not readable"
    return None


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in paths if not path.name.startswith((LISTS, ".")))


def _sums(folder: Path, names: Sequence[str]) -> list[tuple[int, int]]:
    """Size and CRC-32 of files, several at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: _sum(folder / name), names))


def _sum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
