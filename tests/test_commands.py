"""The documents' commands, run as they stand on a tiny model; the others are listed here with the reason."""

import gzip
import json
import runpy
import shlex
import sys
from pathlib import Path

import jax
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from qstar_jax.cli.main import main
from qstar_jax.models import CausalLM
from qstar_jax.store import hub

from .test_readme import DOCUMENTS, ROOT, blocks

# Beginning of a command -> a file that it must leave. They are run one after another, in one folder.
RUN = {
    "qstar dpo --model HuggingFaceTB/SmolLM2-135M-Instruct": "runs/mine/summary.json",
    "qstar export --model runs/mine": "exported/model.safetensors",
    "qstar dpo --config configs/dpo_smollm2_cpu.yaml": "runs/smollm2/summary.json",
    "qstar score --model runs/smollm2": "runs/credit/credit.json",
    "qstar decline --without_sft runs/smollm2": "runs/decline/decline.json",
    "python -m qstar_jax.demo.inverse_q": "advantages.png",
}
# Part of a command -> why it is not run.
NOT_RUN = {
    "--reference.mode cached --lora.rank 16": "as long as the command without; see tests/training/test_lora_runs.py",
    "pip install": "makes an environment; .ci/run does, and runs the demo, the tests and the check of accelerators",
    "gs://": "reads and writes buckets; tests/store/test_cloud_runs.py asks emulators",
    "qstar view": "serves until it is interrupted; see tests/cli/test_view.py",
    "lm_eval": "names a task of the hub; tests/cli/test_export.py runs one of its own",
    "qstar sweep": "its judges are a model that costs money, and a server; see tests/evaluation/judges/",
    "OPENAI_API_KEY=none qstar sweep": "half an hour; tests/evaluation/judges/test_llm_real.py asks such a server",
    "transformers serve": "the server of that sweep",
    "qstar report": "shows the sweep; `qstar demo` writes the same page",
    "qstar play": "hundreds of games; see tests/tasks/test_textarena.py",
    "qstar dpo --model $MODEL --out runs/player": "reads those games; see tests/cli/test_main.py for its losses",
    "qstar dpo --config runs/demo/dpo-0.3": "goes on from a run of `qstar demo`; minutes, and see tests/demo/",
    "qstar dpo --model $MODEL --out runs/prm": "reads solutions with labels; see tests/losses/test_pointwise.py",
    "qstar score --model runs/prm": "reads solutions with marked steps; see tests/cli/test_score_steps.py",
    "qstar select": "reads several solutions of each question; see tests/evaluation/insights/test_selection.py",
    "qstar pairs": "reads many samples of each prompt; see tests/evaluation/test_pairs.py",
    "qstar rl": "minutes; see tests/training/rl/",
    "qstar pipeline": "rows that people compare lie between its commands; see tests/pipeline/",
    "qstar control": "minutes, and a simulator; see tests/control/test_run.py",
    "python -m qstar_jax.demo.equivalence": "minutes; see tests/demo/test_equivalence.py",
    "python tests/benchmarks": "minutes on a quiet machine; see tests/benchmarks/test_worker.py",
}


COMMANDS = [
    " ".join(command.split())
    for document in DOCUMENTS
    for block in blocks(document, "sh")
    for command in block.replace("\\\n", " ").splitlines()
    if command.strip()
]


def is_run(command: str) -> bool:
    return not any(part in command for part in NOT_RUN)


def test_every_command_is_run_or_has_a_reason_not_to_be():
    assert not [command for command in COMMANDS if is_run(command) and not command.startswith(tuple(RUN))]
    assert not [start for start in RUN if not any(map(is_run, having(start)))]
    assert not [part for part in NOT_RUN if not any(part in command for command in COMMANDS)]


def having(start: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(start)]


@pytest.fixture
def place(tmp_path, tiny_config, monkeypatch) -> Path:
    """A folder with what the documents speak of: the repository's files, a chat model and pairs."""
    for name in ("configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = (ROOT / "tests" / "real" / "corrupted_answers.jsonl").read_text(encoding="utf-8").splitlines()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, vocab_size=1000, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    keys = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "num_hidden_layers": 1,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = CausalLM.from_hf(tiny_config | keys)
    hub.write_folder(tmp_path / "model", model, jax.jit(model.init)(jax.random.key(0)), tokenizer, "float32")
    pairs = [{name: json.loads(line)[name] for name in ("prompt", "chosen", "rejected")} for line in lines]
    text = "".join(json.dumps(pair) + "\n" for pair in pairs).encode()
    (tmp_path / "pairs.jsonl").write_bytes(text * 2)
    (tmp_path / "alpaca_prefs_train.jsonl.gz").write_bytes(gzip.compress(text * 7))
    (tmp_path / "alpaca_prefs_test.jsonl.gz").write_bytes(gzip.compress(text))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str], monkeypatch):
    if words[0] == "qstar":
        assert main(words[1:]) == 0
    else:
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")


@pytest.mark.slow
def test_commands_run_as_they_stand(place, on_devices, monkeypatch):
    for start, file in RUN.items():
        for command in filter(is_run, having(start)):
            words = shlex.split(command.replace("$MODEL", "model"), comments=True)
            words = ["model" if word == "HuggingFaceTB/SmolLM2-135M-Instruct" else word for word in words]
            with on_devices(1):
                run(words, monkeypatch)
            assert (place / file).stat().st_size > 0, command
