import json
import os
import re
import shutil
import signal
from datetime import datetime

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions, MeshOptions
from qstar_jax.decoding.decoder import Decoder
from qstar_jax.interruption import CTRL_C
from qstar_jax.store.open import load_model


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
    assert list(found[0]) == [*fields, "certified", "seed", "drawn", "prompt_truncated", "reason"]
    assert found[0]["prompt_truncated"] is False and found[0]["reason"] is None
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
    assert not decoded and "has responses to all 11 prompts" in capsys.readouterr().out
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


def test_a_run_that_is_stopped_says_how_to_go_on(hf_folder, eval_file, tmp_path, one_device_only, monkeypatch, capsys):
    call = Decoder.__call__

    def call_and_stop(self, prompts, rows=None, **more):
        if rows[0] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return call(self, prompts, rows, **more)

    words = ["--model", hf_folder, "--data.eval", eval_file, "--batch_size", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__call__", call_and_stop)
        assert generate(tmp_path / "out", *words) == CTRL_C
    said = capsys.readouterr().err
    assert (
        f"stopped after 8 of 11 prompts: {tmp_path / 'out' / 'generations.jsonl'}; go on with\nqstar generate" in said
    )
    assert [r["row"] for r in records(tmp_path / "out")] == list(range(8))
    assert generate(tmp_path / "out", *words) == generate(tmp_path / "whole", *words) == 0
    texts = [(tmp_path / name / "generations.jsonl").read_bytes() for name in ("out", "whole")]
    assert texts[0] == texts[1]


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
    assert "responds to another prompt in row 0" in refused("--data.eval", other, out="changed")
    (tmp_path / "changed" / "config.yaml").unlink()
    assert "no config.yaml beside it" in refused(out="changed")
    (tmp_path / "changed" / "config.yaml").write_text((tmp_path / "out" / "config.yaml").read_text())
    (tmp_path / "changed" / "generations.jsonl").write_text("nonsense\n")
    assert "a line is not a generation" in refused(out="changed")


@pytest.fixture
def folder(hf_folder, tmp_path):
    """A model that a test may change."""
    return shutil.copytree(hf_folder, tmp_path / "model")


def train_again(folder):
    """Other weights in the same place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.001)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


CHANGES = {
    "weights": (
        train_again,
        r"model\.parameters \w{12}\.\.\., and it is \w{12}\.\.\. now \(other weights under the same",
    ),
    "shape": (
        lambda f: edit_json(f / "config.json", rope_theta=123.0, rope_parameters=None),
        r"model\.config\.rope_parameters\.rope_theta 10000.0, and it is 123",
    ),
    "tokenizer": (
        lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
        r"model\.tokenizer .* chat template",
    ),
    "ends": (lambda f: edit_json(f / "generation_config.json", eos_token_id=[2, 9]), r"ends \[2\], and it is \[2, 9\]"),
}


def test_answers_of_a_model_that_has_changed_are_not_taken_for_its_own(
    folder, hf_folder, eval_file, tmp_path, one_device_only, decoded, capsys
):
    out, words = tmp_path / "out", ["--model", folder, "--data.eval", eval_file, "--data.max_eval_rows", "2"]
    assert generate(out, *words) == 0
    assert generate(out, *words) == 0 and "responses to all 2 prompts" in capsys.readouterr().out
    kept = (out / "generations.jsonl").read_bytes()
    decoded.clear()
    for change, named in CHANGES.values():
        shutil.rmtree(folder)
        shutil.copytree(hf_folder, folder)
        change(folder)
        for content in (kept, kept.splitlines(keepends=True)[0]):  # a complete file, and one that was broken off
            (out / "generations.jsonl").write_bytes(content)
            assert generate(out, *words) == 2
            said = capsys.readouterr()
            assert re.search(named, said.err) and said.err.rstrip().endswith("or remove that folder to start over")
            assert "nothing to do" not in said.out and not decoded
            assert (out / "generations.jsonl").read_bytes() == content
    # Answers that do not say whose they are, are nobody's; a folder without an answer belongs to whom comes next.
    (out / "generations.identity.json").unlink()
    assert generate(out, *words) == 2
    assert "unknown which model made the responses" in capsys.readouterr().err
    (out / "generations.jsonl").write_bytes(b"")
    assert generate(out, *words) == 0 and len(records(out)) == 2


def test_other_models_that_take_part_are_known_too(folder, hf_folder, tmp_path, one_device_only, capsys):
    words = ["--model", hf_folder, "--prompt", "w5 w6"]
    reference = [*words, "--reference", folder, "--decode.beta", "0.1", "--decode.report_reference", "true"]
    guided = [*words, "--pairs", json.dumps([{"tuned": str(hf_folder), "untuned": str(folder)}])]
    for name, own in {"reference": reference, "guided": guided}.items():
        assert generate(tmp_path / name, *own) == 0
    train_again(folder)
    for name, own in {"reference": reference, "guided": guided}.items():
        assert generate(tmp_path / name, *own) == 2
    message = capsys.readouterr().err
    assert "reference.parameters" in message and "pairs.0.untuned.parameters" in message


def test_a_beta_that_the_run_records_is_part_of_its_answers(dpo_run, tmp_path, one_device_only, capsys):
    words = ["--model", dpo_run, "--prompt", "w5 w6", "--decode.report_reference", "true"]
    assert generate(tmp_path, *words) == 0
    identity = tmp_path / "generations.identity.json"
    identity.write_text(identity.read_text().replace('"beta": 0.3', '"beta": 0.5'))
    assert generate(tmp_path, *words) == 2
    assert "beta 0.5, and it is 0.3 now" in capsys.readouterr().err


def test_settings_that_a_model_asks_for_in_vain_are_told(hf_folder, tmp_path, one_device_only, capsys):
    folder = shutil.copytree(hf_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 3}')
    assert generate(tmp_path / "out", "--model", folder, "--prompt", "\ud83d") == 2  # before anything is compiled
    said = capsys.readouterr()
    assert "asks for top_k 3; only --decode options are read" in said.out and "surrogate" in said.err


def test_every_row_has_its_line_and_says_why_it_has_no_answer(
    picky_folder, picky_file, tmp_path, one_device_only, decoded, capsys
):
    out, words = tmp_path / "out", ["--model", picky_folder, "--data.eval", picky_file, "--data.as_chat"]
    words += ["--batch_size", "9", "--data.max_prompt_length", "3", "--data.max_length", "20"]
    assert generate(out, *words) == 0
    assert "20 rows read, 18 used; 2 dropped" in capsys.readouterr().out
    found, expected = records(out), (out / "generations.jsonl").read_bytes()
    assert [r["row"] for r in found] == list(range(20)) and len({tuple(r) for r in found}) == 1  # the same keys
    assert [r["prompt_truncated"] for r in found] == [True, None, *[False] * 17, None]
    for r in found:
        if r["row"] in (1, 19):
            assert "w0 is no word" in r["reason"] and (r["finish"], r["answers"]) == ("dropped", 0)
            assert all(r[name] is None for name in ("rank", "prompt", "text", "tokens", "logp", "score", "length"))
        else:
            assert r["reason"] is None and r["answers"] == 1 and r["tokens"]
    # Wherever it breaks, it becomes the same file.
    lines = expected.splitlines(keepends=True)
    first, second = [0, *range(2, 10)], [*range(10, 19)]
    for kept, batches in ((0, [first, second]), (1, [first, second]), (2, [first, second]), (10, [second]), (19, [])):
        (out / "generations.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:5])
        decoded.clear()
        assert generate(out, *words) == 0
        assert (out / "generations.jsonl").read_bytes() == expected and decoded == batches, kept
    assert "18 responses: " in capsys.readouterr().out
    assert generate(out, *words) == 0 and "responses to all 18 prompts" in capsys.readouterr().out
    # A row that could not be used and can be now is another prompt, and the other way round.
    for row, text in ((1, "w9"), (2, "w0")):
        changed = [json.loads(line) for line in picky_file.read_text().splitlines()]
        changed[row]["prompt"], changed[19]["prompt"] = text, "w9"  # a tenth may be bad, and no more
        other = tmp_path / f"{row}.jsonl"
        other.write_text("".join(json.dumps(line) + "\n" for line in changed))
        copied = shutil.copytree(out, tmp_path / f"out{row}")
        settings = copied / "config.yaml"
        settings.write_text(settings.read_text().replace(str(picky_file), str(other)))
        assert generate(copied, *[other if word == picky_file else word for word in words]) == 2
    message = capsys.readouterr().err
    assert "in row 1: no usable prompt then, 'w9" in message
    assert "in row 2: 'w5" in message and "then, no usable prompt now" in message


def test_answers_go_on_with_the_day_on_which_they_were_begun(folder, picky_file, tmp_path, one_device_only, capsys):
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }} {{ messages[0]['content'] }}")
    out, words = tmp_path / "out", ["--model", folder, "--data.eval", picky_file, "--data.as_chat"]
    assert generate(out, *words, "--data.max_eval_rows", "2") == 0
    today = datetime.now().date().isoformat()
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["data"]["date"] == today
    # As if that had been a year ago.
    (out / "config.yaml").write_text(yaml.safe_dump(settings | {"data": settings["data"] | {"date": "2025-01-31"}}))
    path = out / "generations.jsonl"
    path.write_text(path.read_text().replace(today.replace("-", " - "), "2025 - 01 - 31"))
    before = records(out)
    assert generate(out, *words) == 0
    assert records(out)[:2] == before and len(records(out)) == 20
    assert generate(out, *words, "--data.date", today) == 2
    assert f"data.date '2025-01-31', and it is '{today}' now" in capsys.readouterr().err


def test_a_prompt_that_is_cut_says_so(hf_folder, tmp_path, one_device_only, capsys):
    words = ["--model", hf_folder, "--prompt", "w1 w2 w3 w4 w5", "--data.max_prompt_length"]
    assert generate(tmp_path / "cut", *words, "4") == 0
    assert "--prompt is longer than 4 tokens (data.max_prompt_length), and lost its" in capsys.readouterr().out
    (record,) = records(tmp_path / "cut")
    assert record["prompt_truncated"] is True and record["prompt"] == "[BOS] w3 w4 w5"
    assert generate(tmp_path / "whole", *words, "9") == 0
    assert "lost" not in capsys.readouterr().out and records(tmp_path / "whole")[0]["prompt_truncated"] is False


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
        (["--prompt", "w1", "--decode.method", "best_of_n"], "has no reference.*name one with --reference"),
        (["--prompt", "w1", "--decode.report_reference", "true"], "has no reference"),
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
    assert "set --decode.beta" in capsys.readouterr().err
    words += ["--decode.num_samples", "2", "--decode.beta"]
    assert generate(tmp_path / "out", *words, "0.2") == 0
    (record,) = records(tmp_path / "out")
    assert record["reward"] == record["score"] == 0 and record["ref_logp"] == record["logp"]
