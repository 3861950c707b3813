"""Ways in which a disk, or a person, damages a checkpoint."""

import os
import random
import shutil
from pathlib import Path


def flip(path: Path, rng: random.Random):
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random):
    """Drops the end of a file."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def blank(path: Path, _: random.Random):
    """Replaces a file by zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def remove(path: Path, _: random.Random):
    """Removes a file."""
    path.unlink()


def damage(folder: Path, seed: int) -> str:
    """Damages a checkpoint in a way of `seed`; returns what was done."""
    rng = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    match seed % 6:
        case 4:
            for path in rng.sample(files, len(files) // 2):
                path.unlink()
            return "half"
        case 5:
            shutil.rmtree(folder / rng.choice(["params", "description"]))
            return "a part"
    way, path = (flip, truncate, blank, remove)[seed % 6], rng.choice(files)
    way(path, rng)
    return f"{way.__name__} {path.relative_to(folder)}"
