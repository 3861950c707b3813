"""What importing costs, and what a user sees when JAX and Flax do not fit: each in a process of its own."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qstar_jax
from qstar_jax._compat import TESTED_PAIRS, mismatch_message

ROOT = Path(qstar_jax.__file__).parent.parent


def python(*words, path=(), **variables):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])} | variables
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)


HEAVY = ("jax", "flax", "transformers", "torch", "orbax", "datasets", "optax")


@pytest.mark.parametrize("imports", ["qstar_jax", "qstar_jax.config, qstar_jax.errors", "qstar_jax.cli.main"])
def test_imports_are_light(imports):
    script = f"import sys, {imports}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("words", [["--help"], ["dpo", "--help"], ["--version"]])
def test_help_is_light(words):
    script = (
        "import sys\nfrom qstar_jax.cli.main import main\n"
        f"try: main({words})\n"
        f"finally: print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("loaded:")


def test_version_is_that_of_the_command():
    assert python("-m", "qstar_jax.cli.main", "--version").stdout.strip() == f"qstar_jax {qstar_jax.__version__}"
    assert re.fullmatch(r"\d+\.\d+\.\d+", qstar_jax.__version__)


@pytest.mark.parametrize("error", ["AttributeError('jax.core.Var')", "ImportError('jax.interpreters.xla')"])
@pytest.mark.parametrize(
    "verb", [["score", "--model", "x", "--out", "y"], ["dpo", "--model", "x", "--out", "y", "--data.train", "z"]]
)
def test_a_broken_pair_gives_one_sentence(error, verb, tmp_path):
    package = tmp_path / "flax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nnx.py").write_text(f"raise {error}")
    done = python("-m", "qstar_jax.cli.main", *verb, path=[tmp_path])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "do not work together" in done.stderr
    assert done.stderr.splitlines()[0] == f"qstar {verb[0]}: {mismatch_message()}"


def test_the_sentence_names_what_is_installed_and_what_to_install():
    from importlib.metadata import version

    message = mismatch_message()
    assert f"jax {version('jax')} and flax {version('flax')} do not work together" in message
    for jax_version, flax_version in TESTED_PAIRS:
        assert f"'jax=={jax_version}' 'flax=={flax_version}'" in message


def test_the_oldest_pair_is_what_the_package_asks_for():
    path = ROOT / "pyproject.toml"
    if not path.is_file():
        pytest.skip("not in a checkout")
    wanted = tomllib.loads(path.read_text())["project"]["dependencies"]
    oldest = min(TESTED_PAIRS)
    assert f"jax>={oldest[0]}" in wanted and f"flax>={oldest[1]}" in wanted
