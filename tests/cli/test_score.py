import hashlib
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar_jax.cli.main import main
from qstar_jax.config import ComputeOptions, DataOptions, MeshOptions
from qstar_jax.data.loading import load_examples
from qstar_jax.evaluation.partial_scores import PARTIAL, PartialScores
from qstar_jax.evaluation.scored import read_scores
from qstar_jax.interruption import TEMPORARY
from qstar_jax.store.checkpoints import find_checkpoint
from qstar_jax.store.open import load_model

BETA = 0.3


def score(out, *words):
    return main(["score", "--out", str(out), *map(str, words)])


def records(out):
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(dpo_run, eval_file, tmp_path_factory, on_devices):
    """Scores from the run's folder alone: the model from which it began is gone, and the folder has moved."""
    place = tmp_path_factory.mktemp("score")
    run = shutil.copytree(dpo_run, place / "moved")
    with on_devices(1):
        assert score(place / "out", "--model", run, "--data.eval", eval_file, "--show", 2) == 0
    return place / "out"


def test_numbers_equal_those_from_full_logits(scored, dpo_run, eval_file, tiny_params, tiny_tokenizer, one_device):
    policy = load_model(find_checkpoint(dpo_run), ComputeOptions(), one_device, MeshOptions())
    logits_of = jax.jit(policy.model.logits)
    found = iter(records(scored))
    for example in load_examples(str(eval_file), "", "preferences", tiny_tokenizer, DataOptions()).examples:
        for role, response in zip(("chosen", "rejected"), example.responses, strict=True):
            record, start, n = next(found), len(example.prompt), len(response.ids)
            ids = np.concatenate([example.prompt, response.ids])
            row = jnp.zeros((1, 32), jnp.int32).at[0, : len(ids)].set(ids)
            z, z_ref = (
                np.asarray(logits_of(params, row, jnp.array([len(ids)]))[0, start - 1 : start + n - 1], np.float64)
                for params in (policy.params, tiny_params)
            )
            logz, logz_ref = (np.log(np.exp(x).sum(-1)) for x in (z, z_ref))
            chosen = z[np.arange(n), response.ids]
            logp, ref = chosen - logz, z_ref[np.arange(n), response.ids] - logz_ref
            assert (record["row"], record["role"]) == (example.row, role)
            assert record["token_ids"] == response.ids.tolist() and record["beta"] == BETA
            assert record["prompt"] == tiny_tokenizer.decode(example.prompt)
            expected = {
                "logp": logp,
                "ref_logp": ref,
                "reward": BETA * (logp - ref),
                "q": BETA * chosen,
                "v": BETA * logz,
            }
            for name, values in expected.items():
                np.testing.assert_allclose(record[name], values, rtol=0, atol=3e-5, err_msg=name)
            np.testing.assert_allclose(record["total_reward"], expected["reward"].sum(), rtol=0, atol=1e-4)
    assert next(found, None) is None
    totals = [abs(record["total_reward"]) for record in records(scored)]
    assert max(totals) > 1e-2  # training has moved the policy


def test_page_and_records_are_there(scored):
    assert len(records(scored)) == 22
    page = (scored / "heatmap.html").read_text()
    assert page.lower().startswith("<!doctype html") and "most likely here" in page


def test_shown_rows_tell_what_else_could_have_been_said(scored, dpo_run, eval_file, tmp_path, one_device_only):
    found = records(scored)
    assert [bool(record["alternatives"]) for record in found] == [True] * 4 + [False] * 18
    for record in found[:4]:
        for token, place in enumerate(record["alternatives"]):
            best = [other["logp"] for other in place]
            assert len(place) == 5 and best == sorted(best, reverse=True)
            assert record["logp"][token] <= best[0] + 1e-5
    words = ["--data.eval", eval_file, "--data.max_eval_rows", "2", "--alternatives", "0"]
    assert score(tmp_path, "--model", dpo_run, *words) == 0
    assert not any(record["alternatives"] for record in records(tmp_path))
    assert "most likely here" not in (tmp_path / "heatmap.html").read_text()


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/4"])
def test_every_folder_of_the_run_will_do(place, dpo_run, eval_file, scored, tmp_path, one_device_only):
    assert score(tmp_path, "--model", dpo_run / place, "--data.eval", eval_file, "--show", "2") == 0
    assert records(tmp_path) == records(scored)


def test_single_answers_and_other_options(dpo_run, eval_file, scored, tmp_path, one_device_only):
    words = ["--model", dpo_run, "--data.eval", eval_file, "--answers", "single", "--beta", "1", "--batch_size", "3"]
    assert score(tmp_path, *words, "--show", "0", "--data.max_eval_rows", "5") == 0
    found, pairs = records(tmp_path), [r for r in records(scored) if r["role"] == "chosen"]
    assert [r["role"] for r in found] == ["answer"] * 5
    for record, other in zip(found, pairs[:5], strict=True):
        assert record["token_ids"] == other["token_ids"] and record["beta"] == 1
        np.testing.assert_allclose(record["reward"], np.array(other["reward"]) / BETA, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "heatmap.html").exists()


def test_a_folder_model_with_a_given_reference(hf_folder, dpo_run, eval_file, tmp_path, one_device_only, capsys):
    words = ["--model", hf_folder, "--reference", hf_folder, "--beta", "0.1", "--data.eval", eval_file]
    assert score(tmp_path, *words) == 0
    assert all(reward == 0 for record in records(tmp_path) for reward in record["reward"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: policy and reference are identical: every reward is 0" in printed


def test_a_reference_that_is_gone_is_missed(dpo_run, eval_file, tmp_path, one_device_only, capsys):
    run = shutil.copytree(dpo_run, tmp_path / "run")
    shutil.rmtree(run / "reference")
    assert score(tmp_path / "out", "--model", run, "--data.eval", eval_file) == 2
    assert "is no longer next to its checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "{hf}", "--data.eval", "{eval}"], "has no reference.*--reference"),
        (["--model", "{hf}", "--reference", "{hf}", "--data.eval", "{eval}"], "--beta"),
        (["--model", "{run}"], "--data.eval is missing"),
        (["--model", "{run}", "--data.eval", "{eval}", "--batch_size", "0"], "--batch_size 0"),
        (["--model", "{run}", "--data.eval", "{single}"], "no column 'chosen'.* scored with --answers single"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    words, named, hf_folder, dpo_run, eval_file, tmp_path, one_device_only, capsys
):
    import re

    (single := tmp_path / "single.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n')
    names = {"hf": hf_folder, "run": dpo_run, "eval": eval_file, "single": single}
    assert score(tmp_path / "out", *[word.format(**names) for word in words]) == 2
    assert re.search(named, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_shape_is_refused(
    dpo_run, tiny_config, tiny_tokenizer, eval_file, tmp_path, one_device_only, capsys
):
    from qstar_jax.models import CausalLM
    from qstar_jax.store import hub

    model = CausalLM.from_hf(tiny_config | {"num_hidden_layers": 1})
    hub.write_folder(tmp_path / "other", model, jax.jit(model.init)(jax.random.key(0)), tiny_tokenizer, "float32")
    words = ["--model", dpo_run, "--reference", tmp_path / "other", "--data.eval", eval_file]
    assert score(tmp_path / "out", *words) == 2
    assert "different shapes" in capsys.readouterr().err


def test_scores_on_eight_devices_equal_those_on_one(dpo_run, eval_file, scored, tmp_path):
    words = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.min_shard_size", "64"]
    assert score(tmp_path, "--model", dpo_run, "--data.eval", eval_file, *words) == 0
    for record, other in zip(records(tmp_path), records(scored), strict=True):
        np.testing.assert_allclose(record["reward"], other["reward"], rtol=0, atol=3e-5)
        np.testing.assert_allclose(record["q"], other["q"], rtol=0, atol=3e-5)
        for place, expected in zip(record["alternatives"], other["alternatives"], strict=False):
            found, best = ([a["logp"] for a in alternatives] for alternatives in (place, expected))
            np.testing.assert_allclose(found, best, rtol=0, atol=3e-5)


def test_every_row_has_its_line_and_says_why_it_has_no_score(
    picky_folder, picky_file, tmp_path, one_device_only, capsys
):
    words = ["--model", picky_folder, "--reference", picky_folder, "--beta", "0.1", "--data.eval", picky_file]
    assert score(tmp_path, *words, "--data.as_chat", "--data.max_prompt_length", "3", "--data.max_length", "9") == 0
    assert "20 rows read, 18 used; 2 dropped" in capsys.readouterr().out
    found = records(tmp_path)
    roles = {row: [None] if row in (1, 19) else ["chosen", "rejected"] for row in range(20)}
    assert [(r["row"], r["role"]) for r in found] == [(row, role) for row in roles for role in roles[row]]
    assert len({tuple(r) for r in found}) == 1  # the same keys
    for r in found:
        if r["role"] is None:
            assert "w0 is no word" in r["reason"] and r["total_reward"] is r["logp"] is r["token_ids"] is None
        else:
            assert r["reason"] is None and r["total_reward"] == 0 and r["prompt_truncated"] == (r["row"] == 0)
    assert [(s.row, s.role) for s in read_scores(tmp_path / "scores.jsonl")] == [
        (r["row"], r["role"]) for r in found if r["role"]
    ]


def test_a_reference_that_was_exchanged_is_refused(dpo_run, eval_file, tmp_path, one_device_only, capsys):
    run = shutil.copytree(dpo_run, tmp_path / "run")
    shutil.rmtree(run / "reference")
    shutil.copytree(run / "checkpoints" / "4", run / "reference")
    words = ["--model", run, "--data.eval", eval_file]
    assert score(tmp_path / "out", *words) == 2
    message = capsys.readouterr().err
    assert "reference has changed since the run began" in message and "name the reference" in message
    assert not (tmp_path / "out").exists()
    words += ["--reference", run / "reference"]  # who names it knows what it is
    assert score(tmp_path / "out", *words, "--data.max_eval_rows", "2", "--alternatives", "0") == 0
    assert all(reward == 0 for record in records(tmp_path / "out") for reward in record["reward"])


def test_nothing_of_an_earlier_run_stays_beside_new_scores(dpo_run, eval_file, tmp_path, one_device_only, capsys):
    marked, out, page = tmp_path / "marked.jsonl", tmp_path / "out", tmp_path / "page"
    rows = [json.loads(line) for line in eval_file.read_text().splitlines()]
    marked.write_text("".join(json.dumps(r | {"oops": [[0, len(r["rejected"].split()[0])]]}) + "\n" for r in rows))
    words = ["--model", dpo_run, "--data.eval", marked, "--alternatives", "0"]
    assert score(out, *words, "--wrong", "oops") == 0
    measured = {name: (out / name).read_bytes() for name in ("credit.json", "scores.jsonl")}
    assert json.loads(measured["credit.json"])["scores"] == hashlib.sha256(measured["scores.jsonl"]).hexdigest()
    # The first word of each rejected response is marked in the scores, and on the page.
    wrong = {record["role"]: record["wrong"] for record in records(out)}
    assert wrong["chosen"] == [] and wrong["rejected"][0] and not any(wrong["rejected"][1:])
    assert "marked as wrong" in (out / "heatmap.html").read_text()
    identity = json.loads((out / "scores.identity.json").read_text())
    assert identity["beta"] == BETA and identity["data"]["rows"] == 11 and identity["options"]["wrong"] == "oops"
    assert identity["model"]["parameters"] != identity["reference"]["parameters"]
    assert main(["report", "--credit", str(out), "--out", str(page)]) == 0
    assert score(out, *words, "--show", "0", "--data.max_eval_rows", "2") == 0
    assert {path.name for path in out.iterdir()} == {"scores.jsonl", "scores.identity.json"}
    # Brought together by hand, they are told apart.
    capsys.readouterr()
    (out / "credit.json").write_bytes(measured["credit.json"])
    assert main(["report", "--credit", str(out), "--out", str(page)]) == 2
    assert "was not measured on" in (message := capsys.readouterr().err) and "score --wrong COLUMN" in message
    (out / "scores.jsonl").unlink()
    assert main(["report", "--credit", str(out), "--out", str(page)]) == 2
    assert "found: nothing there" in capsys.readouterr().err


def test_scores_go_on_from_whole_batches(dpo_run, eval_file, tmp_path, one_device_only, monkeypatch, capsys):
    words = ["--model", dpo_run, "--data.eval", eval_file, "--batch_size", 4, "--show", 5]
    append, batches = PartialScores.append, []

    def append_and_stop(self, scores):
        append(self, scores)
        batches.append([one.row for one in scores])
        if len(batches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PartialScores, "append", append_and_stop)
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert score(out, *words) == TEMPORARY and not (out / "scores.jsonl").exists()
    said = capsys.readouterr().err
    assert f"stopped after 8 of 22 responses: {out / PARTIAL}; go on with\nqstar score --out {out}" in said
    with (out / PARTIAL).open("a") as file:
        file.write('{"row": 4, "ro')  # of a process that was killed
    assert score(out, *words) == 0 and batches[1][0] == 4
    assert score(whole, *words) == 0 and len(batches) == 6
    assert (out / "scores.jsonl").read_bytes() == (whole / "scores.jsonl").read_bytes()
    assert not list(out.glob("scores.partial*"))
    # Those of other options are not taken.
    batches[:] = []
    assert score(out, *words) == TEMPORARY
    assert score(out, *words, "--beta", 0.7) == 0 and batches[1][0] == 0
    assert "is of other models, data or options: scoring begins anew" in capsys.readouterr().out
