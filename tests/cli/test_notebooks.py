"""The notebooks of launch/colab: equal to their text, and executed from top to bottom in a small setting."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import qstar_jax
from qstar_jax._compat import TESTED_PAIRS

ROOT = Path(qstar_jax.__file__).parent.parent
FOLDER = ROOT / "launch" / "colab"
jupytext = pytest.importorskip("jupytext", reason="needs the extra `notebooks`")
papermill = pytest.importorskip("papermill", reason="needs the extra `notebooks`")
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_their_text(name):
    """`jupytext --sync launch/colab/*.py` makes them equal."""
    text, notebook = (jupytext.read(FOLDER / f"{name}.{ending}") for ending in ("py", "ipynb"))
    assert [(cell.cell_type, cell.source) for cell in text.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    assert [cell.source for cell in text.cells if "install" in cell.metadata.get("tags", ())] == [INSTALL]


INSTALL = next(
    cell.source for cell in jupytext.read(FOLDER / "4_theory.py").cells if "install" in cell.metadata.get("tags", ())
)


@pytest.fixture
def small(hf_folder, dpo_run):
    """Parameters of a small setting: notebook -> its parameters."""
    plain = {"AS_CHAT": False}
    words = {"PROMPT": "w1 w2", "RIGHT": "w3 w4", "WRONG": "w5 w6 w7"}
    return {
        "1_see_credit": plain | words | {"MODEL": str(dpo_run), "REFERENCE": None, "BETA": None, "DTYPE": "float32"},
        "2_train_on_your_pairs": plain | {"MODEL": str(hf_folder), "STEPS": 4, "RANK": 2, "LEARNING_RATE": 1e-2},
        "3_search": plain | {"MODEL": str(hf_folder), "PROMPTS": ["w1 w2", "w3"], "WIDTHS": [1, 3], "MDPS": 2},
        "4_theory": {"DEPTH": 2},
        "5_pods": {"MODEL": str(hf_folder), "BATCH_SIZE": 8},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_from_top_to_bottom(name, small, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    source, done = tmp_path / f"{name}.ipynb", tmp_path / "done.ipynb"
    notebook = jupytext.read(FOLDER / f"{name}.py")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    jupytext.write(notebook, source)
    papermill.execute_notebook(source, done, small[name], cwd=tmp_path, progress_bar=False, execution_timeout=300)
    shown = [output for cell in jupytext.read(done).cells for output in cell.get("outputs", ())]
    check = CHECKS[name]
    texts = "\n".join(str(output.get("text") or output.get("data")) for output in shown)
    for expected in check:
        assert expected in texts, f"{name}: no {expected!r} in its outputs"


CHECKS = {  # what a reader must see
    "1_see_credit": ("<iframe srcdoc=", "total reward", "beta log pi"),
    "2_train_on_your_pairs": ("image/png", "<iframe srcdoc=", "<table", "model.safetensors"),
    "3_search": ("<table", "3 beams: log pi", "certified: True"),
    "4_theory": ("image/png", "step 120: loss", "no potential", "the reference's own responses -"),
    "5_pods": ("estimated", "GiB", "--train.batch_size"),
}


def test_the_install_cell_leaves_an_installed_library_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INSTALL], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0 and not done.stdout


@pytest.mark.slow
@pytest.mark.skipif("QSTAR_COLAB" not in os.environ, reason="QSTAR_COLAB names no Python with launch/colab/pins.txt")
def test_the_install_cell_works_from_colabs_pins(tmp_path):
    """Colab's JAX is older than ours; the cell replaces it, restarts the runtime, and a notebook runs to its end."""
    python = os.environ["QSTAR_COLAB"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PYTHON"))}

    def run(*words):
        return subprocess.run([python, *words], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=900)

    cell = INSTALL.replace('SOURCE = "qstar_jax"', f"SOURCE = {str(ROOT)!r}")
    assert cell != INSTALL
    if run("-c", "import qstar_jax").returncode:
        done = run("-c", cell)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert done.stdout == f"installing {ROOT}\n" or not done.stdout  # what was not flushed before the restart
    # After the restart the cell does nothing, and the notebook runs.
    text = (FOLDER / "4_theory.py").read_text(encoding="utf-8")
    done = run("-c", f"import matplotlib; matplotlib.use('agg')\n{text.replace('DEPTH = 3', 'DEPTH = 2')}")
    assert done.returncode == 0, done.stderr
    assert "step 120: the reference's own responses -" in done.stdout
    installed = run("-c", "import jax; print(jax.__version__)").stdout
    assert Version(installed) >= Version(min(TESTED_PAIRS)[0])
