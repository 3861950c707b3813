import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.loading import load_model


def generate(out, *words):
    return main(["generate", "--out", str(out), "--decode.max_new_tokens", "6", *map(str, words)])


def records(out):
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def test_beams_from_a_run_are_sorted_and_scored_by_log_pi(dpo_run, tmp_path, one_device_only, one_device):
    words = ["--model", dpo_run, "--prompt", "w5 w6 w7", "--decode.beams", "5", "--decode.return_sequences", "5"]
    assert generate(tmp_path, *words) == 0
    found = records(tmp_path)
    assert [r["rank"] for r in found] == list(range(5)) and {r["row"] for r in found} == {0}
    assert [r["logp"] for r in found] == sorted([r["logp"] for r in found], reverse=True)
    assert len({tuple(r["tokens"]) for r in found}) == 5
    loaded = load_model(dpo_run, ComputeOptions(), one_device, MeshOptions())
    prompt = loaded.tokenizer("w5 w6 w7").input_ids
    assert prompt[0] == loaded.tokenizer.bos_token_id
    for record in found:
        ids = np.array([*prompt, *record["tokens"]])
        row = jnp.zeros((1, 16), jnp.int32).at[0, : len(ids)].set(ids)
        logits = np.asarray(loaded.model.logits(loaded.params, row, jnp.array([len(ids)])), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = logp[np.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]].sum()
        np.testing.assert_allclose(record["logp"], total, atol=1e-4)
        assert record["text"] == loaded.tokenizer.decode(record["tokens"], skip_special_tokens=True)


def test_every_prompt_of_a_file_is_answered_in_order(hf_folder, eval_file, tmp_path, one_device_only):
    assert generate(tmp_path / "a", "--model", hf_folder, "--data.eval", eval_file, "--batch_size", "4") == 0
    found = records(tmp_path / "a")
    assert [r["row"] for r in found] == list(range(11))
    prompts = [json.loads(line)["prompt"] for line in eval_file.read_text().splitlines()]
    assert [r["prompt"] for r in found] == [f"[BOS] {prompt}" for prompt in prompts]
    # What an answer is does not depend on its batch.
    assert generate(tmp_path / "b", "--model", hf_folder, "--data.eval", eval_file, "--batch_size", "11") == 0
    assert [r["tokens"] for r in records(tmp_path / "b")] == [r["tokens"] for r in found]


def test_sampling_options_reach_the_sampler(hf_folder, tmp_path, one_device_only):
    words = ["--model", hf_folder, "--prompt", "w5 w6", "--decode.return_sequences", "4", "--decode.temperature"]
    results = {}
    for name, more in {"plain": ["1"], "again": ["1"], "seed": ["1", "--decode.seed", "1"], "cold": ["0.1"]}.items():
        assert generate(tmp_path / name, *words, *more) == 0
        results[name] = [r["tokens"] for r in records(tmp_path / name)]
        assert len(results[name]) == 4
    assert results["plain"] == results["again"]
    assert results["plain"] != results["seed"] and results["plain"] != results["cold"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--prompt TEXT or --data.eval"),
        (["--prompt", "w1", "--data.eval", "x.jsonl"], "either --prompt"),
        (["--prompt", "w1", "--decode.beams", "2", "--decode.temperature", "1"], "beams 2"),
        (["--prompt", "w1", "--decode.return_sequences", "2"], "return_sequences 2"),
        (["--prompt", "w1", "--decode.top_k", "2"], "top_k"),
        (["--prompt", "w1", "--batch_size", "0"], "--batch_size 0"),
        (["--prompt", "w1", "--batch_size", "-1"], "--batch_size -1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, named, hf_folder, tmp_path, one_device_only, capsys):
    assert generate(tmp_path / "out", "--model", hf_folder, *words) == 2
    assert re.search(named, capsys.readouterr().err)
    assert not (tmp_path / "out" / "generations.jsonl").exists()
