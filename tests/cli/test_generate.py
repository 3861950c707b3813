import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.decoding.decoder import Decoder
from qstar_jax.loading import load_model


def generate(out, *words):
    return main(["generate", "--out", str(out), "--decode.max_new_tokens", "6", *map(str, words)])


def records(out):
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


@pytest.fixture
def decoded(monkeypatch):
    """Rows of each batch that was decoded."""
    seen, call = [], Decoder.__call__

    def count(self, prompts, rows=None, **more):
        seen.append(list(rows))
        return call(self, prompts, rows, **more)

    monkeypatch.setattr(Decoder, "__call__", count)
    return seen


def test_beams_from_a_run_are_sorted_and_scored_by_log_pi(dpo_run, tmp_path, one_device_only, one_device):
    words = ["--model", dpo_run, "--prompt", "w5 w6 w7", "--decode.method", "beam", "--decode.beams", "5"]
    assert generate(tmp_path, *words, "--decode.return_sequences", "5", "--decode.report_reference", "true") == 0
    found = records(tmp_path)
    assert [r["rank"] for r in found] == list(range(5)) and {r["row"] for r in found} == {0}
    assert [r["logp"] for r in found] == sorted([r["logp"] for r in found], reverse=True)
    assert len({tuple(r["tokens"]) for r in found}) == 5
    loaded = load_model(dpo_run, ComputeOptions(), one_device, MeshOptions())
    reference = load_model(loaded.reference, ComputeOptions(), one_device, MeshOptions())
    prompt = loaded.tokenizer("w5 w6 w7").input_ids
    assert prompt[0] == loaded.tokenizer.bos_token_id

    def log_pi(member, tokens):
        ids = np.array([*prompt, *tokens])
        row = jnp.zeros((1, 16), jnp.int32).at[0, : len(ids)].set(ids)
        logits = np.asarray(member.model.logits(member.params, row, jnp.array([len(ids)])), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logp[np.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]].sum()

    for record in found:
        logp, ref_logp = (log_pi(member, record["tokens"]) for member in (loaded, reference))
        np.testing.assert_allclose([record["logp"], record["ref_logp"]], [logp, ref_logp], atol=1e-4)
        # The run's own reference and beta; the two models differ, or this would show nothing.
        np.testing.assert_allclose(record["reward"], 0.3 * (logp - ref_logp), atol=1e-4)
        assert abs(logp - ref_logp) > 1e-3 and record["score"] == record["logp"]
        assert record["text"] == loaded.tokenizer.decode(record["tokens"], skip_special_tokens=True)
    fields = [
        "row",
        "rank",
        "answers",
        "prompt",
        "text",
        "tokens",
        "length",
        "logp",
        "ref_logp",
        "reward",
        "score",
        "finish",
    ]
    assert list(found[0]) == [*fields, "certified", "seed"]
    assert found[0]["certified"] in (True, False) and found[1]["certified"] is None


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
    words = ["--model", hf_folder, "--prompt", "w5 w6", "--decode.method", "sample", "--decode.return_sequences", "4"]
    results = {}
    for name, more in {"plain": [], "again": [], "seed": ["seed", "1"], "cold": ["temperature", "0.1"]}.items():
        assert generate(tmp_path / name, *words, *([f"--decode.{more[0]}", more[1]] if more else [])) == 0
        results[name] = [r["tokens"] for r in records(tmp_path / name)]
        assert len(results[name]) == 4
    assert results["plain"] == results["again"]
    assert results["plain"] != results["seed"] and results["plain"] != results["cold"]


def test_lists_of_strings_come_from_the_command_line(hf_folder, tmp_path, one_device_only):
    words = ["--model", hf_folder, "--prompt", "w5 w6"]
    assert generate(tmp_path / "free", *words) == 0
    (free,) = records(tmp_path / "free")
    stop = " ".join(free["text"].split()[2:4])
    assert generate(tmp_path / "stop", *words, "--decode.stop", json.dumps([stop, "[EOS] w0"])) == 0
    (cut,) = records(tmp_path / "stop")
    assert cut["finish"] == "stop" and cut["text"] == free["text"].split(stop)[0] and len(cut["text"]) > 3
    assert cut["tokens"] == free["tokens"][: cut["length"]]


def test_pairs_of_models_guide_another(dpo_run, hf_folder, tmp_path, one_device_only):
    words = ["--prompt", "w5 w6 w7"]
    pair = {"tuned": str(dpo_run), "untuned": str(hf_folder), "weight": 1.0}
    assert generate(tmp_path / "base", "--model", hf_folder, *words) == 0
    assert generate(tmp_path / "tuned", "--model", dpo_run, *words) == 0
    assert generate(tmp_path / "pair", "--model", hf_folder, *words, "--pairs", json.dumps([pair])) == 0
    base, tuned, guided = (records(tmp_path / name)[0] for name in ("base", "tuned", "pair"))
    assert guided["tokens"] == tuned["tokens"] and guided["logp"] == pytest.approx(tuned["logp"], abs=1e-4)
    assert guided["logp"] != pytest.approx(base["logp"], abs=1e-3) and guided["reward"] is None


@pytest.fixture(scope="module")
def whole(hf_folder, eval_file, tmp_path_factory):
    """The words of a run of three batches with two samples a row, and its folder once it was made."""
    words = ["--model", hf_folder, "--data.eval", eval_file, "--decode.method", "sample"]
    return [*words, "--decode.return_sequences", "2", "--batch_size", "4"], tmp_path_factory.mktemp("whole") / "out"


def test_a_broken_run_goes_on_where_it_was(whole, tmp_path, one_device_only, decoded, capsys):
    words, out = whole
    assert generate(out, *words) == 0
    assert decoded == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    expected = (out / "generations.jsonl").read_bytes()
    lines = expected.splitlines(keepends=True)
    assert len(lines) == 22
    # Bytes that are left of the file, and batches that must be decoded again.
    sizes = {
        "nothing": (0, 3),
        "half a line": (len(lines[0]) // 2, 3),
        "half a row": (len(b"".join(lines[:3])), 3),
        "two batches": (len(b"".join(lines[:16])), 1),
        "two batches and half a line": (len(b"".join(lines[:16])) + 20, 1),
        "all but a byte": (len(expected) - 1, 1),
    }
    for name, (size, batches) in sizes.items():
        broken = shutil.copytree(out, tmp_path / name)
        (broken / "generations.jsonl").write_bytes(expected[:size])
        decoded.clear()
        assert generate(broken, *words) == 0
        assert (broken / "generations.jsonl").read_bytes() == expected, name
        assert len(decoded) == batches, name
    # A last row that has fewer answers than were asked for, as there were no more, is complete.
    fewer = shutil.copytree(out, tmp_path / "fewer")
    last = json.dumps(json.loads(lines[20]) | {"answers": 1}).encode() + b"\n"
    (fewer / "generations.jsonl").write_bytes(b"".join(lines[:20]) + last)
    decoded.clear()
    assert generate(fewer, *words) == 0 and not decoded
    # Nothing is left to do, whatever the size of batches.
    decoded.clear()
    capsys.readouterr()
    assert generate(out, *words, "--batch_size", "3") == 0
    assert not decoded and "all 11 prompts are answered" in capsys.readouterr().out
    assert (out / "generations.jsonl").read_bytes() == expected


def test_a_run_that_is_killed_has_kept_its_batches(hf_folder, eval_file, tmp_path, one_device_only, monkeypatch):
    call, batches = Decoder.__call__, []

    def fail(self, prompts, rows=None, **more):
        batches.append(rows)
        if len(batches) == 3:
            raise RuntimeError("the power is gone")
        return call(self, prompts, rows, **more)

    monkeypatch.setattr(Decoder, "__call__", fail)
    words = ["--model", hf_folder, "--data.eval", eval_file, "--batch_size", "4"]
    assert generate(tmp_path / "out", *words) == 1
    assert [r["row"] for r in records(tmp_path / "out")] == list(range(8))
    assert generate(tmp_path / "out", *words) == 0 and batches[-1] == [8, 9, 10]
    assert [r["row"] for r in records(tmp_path / "out")] == list(range(11))
    # More rows of the same file may be asked for later.
    assert generate(tmp_path / "few", *words, "--data.max_eval_rows", "2") == 0
    assert len(records(tmp_path / "few")) == 2
    assert generate(tmp_path / "few", *words) == 0
    assert [r["tokens"] for r in records(tmp_path / "few")] == [r["tokens"] for r in records(tmp_path / "out")]
    # And fewer: there is nothing to do then, and nothing is lost.
    assert generate(tmp_path / "few", *words, "--data.max_eval_rows", "2") == 0
    assert len(records(tmp_path / "few")) == 11


def test_other_settings_do_not_go_on(hf_folder, eval_file, tmp_path, one_device_only, capsys):
    words = ["--model", hf_folder, "--data.eval", eval_file, "--data.max_eval_rows", "2"]
    assert generate(tmp_path / "out", *words) == 0
    before = (tmp_path / "out" / "generations.jsonl").read_bytes()

    def refused(*more, out="out"):
        assert generate(tmp_path / out, *words, *more) == 2
        assert (tmp_path / "out" / "generations.jsonl").read_bytes() == before
        return capsys.readouterr().err

    message = refused("--decode.method", "sample", "--decode.seed", "3")
    assert "decode.method 'greedy', and it is 'sample' now; choose another --out, or remove that folder" in message
    assert "decode.no_repeat_ngram_size 0, and it is 2 now" in refused("--decode.no_repeat_ngram_size", "2")
    # The prompts themselves have changed.
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "w1"}\n{"prompt": "w2"}\n')
    stored = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    stored["data"]["eval"] = str(other)
    shutil.copytree(tmp_path / "out", tmp_path / "changed")
    (tmp_path / "changed" / "config.yaml").write_text(yaml.safe_dump(stored))
    assert "answers another prompt in row 0" in refused("--data.eval", other, out="changed")
    (tmp_path / "changed" / "config.yaml").unlink()
    assert "no config.yaml beside it" in refused(out="changed")
    (tmp_path / "changed" / "config.yaml").write_text((tmp_path / "out" / "config.yaml").read_text())
    (tmp_path / "changed" / "generations.jsonl").write_text("nonsense\n")
    assert "a line that is no answer" in refused(out="changed")


def test_the_folder_of_a_training_run_is_left_alone(dpo_run, tmp_path, one_device_only, capsys):
    run = shutil.copytree(dpo_run, tmp_path / "run")
    before = (run / "config.yaml").read_bytes()
    assert generate(run, "--model", run, "--prompt", "w1") == 2
    assert "belongs to another verb" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before and not (run / "generations.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--prompt TEXT or --data.eval"),
        (["--prompt", "w1", "--data.eval", "x.jsonl"], "either --prompt"),
        (["--prompt", "w1", "--decode.beams", "5"], r"decode: beams 5 .* set --decode.method beam"),
        (["--prompt", "w1", "--decode.top_k", "2"], r"decode: top_k 2 .* set --decode.method sample"),
        (["--prompt", "w1", "--batch_size", "0"], "--batch_size 0"),
        (["--prompt", "w1", "--batch_size", "-1"], "--batch_size -1"),
        (["--prompt", "w1", "--reference", "x"], r"--reference x has no effect.*--decode.report_reference true"),
        (["--prompt", "w1", "--decode.method", "best_of_n"], "carries no reference.*name one with --reference"),
        (["--prompt", "w1", "--decode.report_reference", "true"], "carries no reference"),
        (["--prompt", "w1", "--decode.stop", '["q"]'], "stop string 'q': no sequence"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, named, hf_folder, tmp_path, one_device_only, capsys):
    assert generate(tmp_path / "out", "--model", hf_folder, *words) == 2
    assert re.search(named, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_reference_that_is_named_needs_a_beta(hf_folder, tmp_path, one_device_only, capsys):
    words = ["--model", hf_folder, "--prompt", "w1 w2", "--decode.method", "best_of_n", "--reference", hf_folder]
    assert generate(tmp_path / "out", *words) == 2
    assert "give --decode.beta" in capsys.readouterr().err
    words += ["--decode.num_samples", "2", "--decode.beta"]
    assert generate(tmp_path / "out", *words, "0.2") == 0
    (record,) = records(tmp_path / "out")
    assert record["reward"] == record["score"] == 0 and record["ref_logp"] == record["logp"]
