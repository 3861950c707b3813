import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*words: str, program: str = "compile.py") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(HERE / program), *words], capture_output=True, text=True)


def test_a_real_model_on_an_h100(devices_of):
    devices_of("h100:1x1x1")
    done = run("--model", "smollm2-135m", "--shape", "384+48", "--batch", "8", "--compute.remat", "dots")
    record = json.loads(done.stdout)
    assert record["total_gib"] < record["of_gib"] == 79.11
    # The logits and attention are computed once more than a model's own FLOPs count them.
    assert 1 < record["products_over_model"] < 1.15
    assert list(record["product_flops_by_dtype"]) == ["bf16"]
    assert record["kernels"]["__cudnn$fmhaSoftmaxBackward"] == 30
    assert 0 < record["products_seconds"] < record["memory_seconds"] < 1


def test_a_search_on_an_h100(devices_of):
    devices_of("h100:1x1x1")
    words = ["--model", "smollm2-135m", "--searches", "[greedy 1]", "--new_tokens", "8"]
    record = json.loads(run(*words, program="compile_decoding.py").stdout)
    assert 0 < record["weights_seconds"] < record["memory_seconds"]
    assert record["total_gib"] < record["of_gib"]
    assert record["kernels_per_token"] > 30  # layers


@pytest.mark.slow
def test_bad_words():
    for words, sentence in (
        (["--model", "gpt"], "expected a config.json, or one of llama-3.2-1b"),
        (["--shape", "long"], "expected tldr, chat or lengths in tokens such as 384+48"),
        (["--topology", "a100:1"], "unknown topology 'a100:1'"),
    ):
        done = run(*words)
        assert done.returncode == 1 and sentence in done.stderr
    done = run("--searches", "[sorted 1]", program="compile_decoding.py")
    assert done.returncode == 1 and ("expected beams N" in done.stderr or "pip install" in done.stderr)
