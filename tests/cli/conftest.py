"""A DPO run made by the command line; the model that it began from is gone."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qstar_jax
from qstar_jax.cli.main import main
from qstar_jax.store import hub

ROOT = Path(qstar_jax.__file__).parent.parent


@pytest.fixture(scope="session")
def dpo_run(tmp_path_factory, hf_folder, train_file, on_devices):
    """Folder of a run of `qstar dpo`; nothing but that folder is left of it."""
    place = tmp_path_factory.mktemp("cli")
    model = shutil.copytree(hf_folder, place / "model")
    out = place / "run"
    words = ["dpo", "--model", str(model), "--out", str(out), "--data.train", str(train_file), "--loss.beta", "0.3"]
    words += ["--train.steps", "4", "--train.batch_size=8", "--optimizer.learning_rate=3e-3", "--train.log_every", "1"]
    with on_devices(1):
        assert main(words) == 0
    shutil.rmtree(model)
    return out


@pytest.fixture(scope="session")
def picky_folder(tmp_path_factory, tiny_model, tiny_params, tiny_tokenizer):
    """The tiny model with a chat template that refuses the word w0."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'w0' in m['content'] %}{{ raise_exception('w0 is no word') }}{% endif %}"
        "{{ m['content'] }} {% endfor %}"
    )
    folder = tmp_path_factory.mktemp("picky") / "model"
    hub.write_folder(folder, tiny_model, tiny_params, tokenizer, "float32")
    return folder


@pytest.fixture(scope="session")
def picky_file(tmp_path_factory):
    """Twenty rows, of which the template refuses the second and the last."""
    prompts = ["w1 w2 w3 w4", "w0", "w5", "w6 w7", *(f"w{8 + i}" for i in range(15)), "w8 w0"]
    rows = [{"prompt": prompt, "chosen": "w9 w10", "rejected": "w11"} for prompt in prompts]
    path = tmp_path_factory.mktemp("picky") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def qstar():
    """`qstar(*words)` runs the command in a process of its own."""

    def run(*words, **variables):
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        command = [sys.executable, "-m", "qstar_jax.cli.main", *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    return run
