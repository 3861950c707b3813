"""The library from Python: five lines, and what each of them refuses."""

import ast
import html
import inspect
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import qstar_jax as qstar
from qstar_jax.api.messages import in_python
from qstar_jax.api.training import with_options
from qstar_jax.config import DpoConfig
from qstar_jax.data.loading import load_examples
from qstar_jax.evaluation.scored import read_scores

PAIRS = [{"prompt": f"w{i} w2", "chosen": f"w{10 + i} w3", "rejected": f"w{20 + i} w4 w5"} for i in range(8)]


@pytest.fixture(scope="module")
def run(hf_folder, tmp_path_factory, on_devices):
    with on_devices(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr("qstar_jax.api.model.make_mesh", lambda options: single_mesh())
        yield qstar.dpo(
            hf_folder, PAIRS, eval_pairs=PAIRS[:4], out=tmp_path_factory.mktemp("api") / "run",
            beta=0.3, learning_rate=1e-2, steps=4, batch_size=4, max_length=64, max_prompt_length=32, train__seed=3,
        )  # fmt: skip


def single_mesh():
    from qstar_jax.sharding import make_mesh

    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model(run):
    return run.model


def test_every_public_name_is_there():
    assert [name for name in qstar.__all__ if not hasattr(qstar, name)] == []
    assert set(qstar.__all__) <= set(dir(qstar))
    with pytest.raises(AttributeError, match="no attribute 'loda'"):
        _ = qstar.loda
    # Editors read the same names off the imports for type checkers.
    tree = ast.parse(Path(qstar.__file__).read_text())
    [checked] = [node for node in tree.body if isinstance(node, ast.If)]
    assert sorted(alias.name for line in checked.body for alias in line.names) == sorted(
        set(qstar.__all__) - {"__version__"}
    )


def test_training_leaves_a_run_of_the_command_line(run):
    config = (run.out / "config.yaml").read_text()
    for line in ("beta: 0.3", "learning_rate: 0.01", "steps: 4", "batch_size: 4", "seed: 3", "max_length: 64"):
        assert line in config, line
    assert [json.loads(line) for line in (run.out / "train.jsonl").open()] == PAIRS
    assert run.summary["eval_loss"] < run.summary["before_eval_loss"]
    steps, losses = run.metrics["loss"]
    assert steps[0] == 0 and losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert run._repr_png_() == (run.out / "curves.png").read_bytes()


def test_scores_are_those_of_the_command_line(run, model, qstar_score):
    scores = model.score("w1 w2", "w11 w3", "w21 w4 w5")
    [first, second] = qstar_score(run.out, run.out / "train.jsonl", row=1)
    for ours, theirs in zip(scores, (first, second), strict=True):
        assert ours.pieces == theirs.pieces and ours.beta == theirs.beta == 0.3
        np.testing.assert_allclose(ours.reward, theirs.reward, atol=1e-5)
        np.testing.assert_allclose(ours.q, theirs.q, atol=1e-5)
    np.testing.assert_allclose(
        model.score("w1 w2", "w11 w3", beta=0.6)[0].reward, 2 * np.array(first.reward), atol=1e-5
    )
    assert [len(place) for place in model.score("w1", "w3", alternatives=2)[0].alternatives] == [2, 2]


@pytest.fixture(scope="module")
def qstar_score(tmp_path_factory, on_devices):
    from qstar_jax.cli.main import main

    def score(run, file, row):
        out = tmp_path_factory.mktemp("scores")
        with on_devices(1):
            assert main(["score", "--model", str(run), "--data.eval", str(file), "--out", str(out)]) == 0
        return [response for response in read_scores(out / "scores.jsonl") if response.row == row]

    return score


def test_logits_are_q_values(model):
    scores = model.score("w1 w2", "w11 w3")
    ids = [1, *model.tokenizer("w1 w2", add_special_tokens=False).input_ids, *scores[0].token_ids]
    logits = model.logits(ids)
    assert logits.shape == (len(ids), 60)
    np.testing.assert_allclose(scores[0].q, [0.3 * logits[2 + t, token] for t, token in enumerate(ids[3:])], atol=1e-4)
    np.testing.assert_array_equal(model.logits([ids, ids])[1], logits)


def test_answers_are_searched_for(model):
    greedy = model.generate(["w1 w2", "w3"], max_new_tokens=6)
    wide = model.generate(["w1 w2", "w3"], max_new_tokens=6, beams=5, return_sequences=3)
    assert len(greedy) == len(wide) == 2 and [len(several) for several in wide] == [3, 3]
    assert all(b[0].logp >= a[0].logp - 1e-5 for a, b in zip(greedy, wide, strict=True))
    single = model.generate("w3", max_new_tokens=6)
    assert single.texts == [greedy.texts[1]]
    # Batches change nothing, and samples depend on the seed alone.
    prompts = ["w1 w2", "w3", "w4 w5 w6"]
    drawn = [model.generate(prompts, method="sample", seed=4, max_new_tokens=6, batch_size=size) for size in (1, 2, 3)]
    assert drawn[0].texts == drawn[1].texts == drawn[2].texts
    assert drawn[0].texts != model.generate(prompts, method="sample", seed=5, max_new_tokens=6).texts
    rewarded = model.generate("w3", beams=2, max_new_tokens=3, objective="implicit_reward")[0][0]
    assert rewarded.reward == pytest.approx(rewarded.score, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([]), "at least one prompt"),
        (lambda m: m.generate("w1", bems=3), "unknown option 'bems'; expected some of method, max_new_tokens"),
        (lambda m: m.generate("w1", temperature=0.5), "temperature"),
        (lambda m: m.generate(["w1", 3]), r"prompts\[1\]: column 'prompt' holds"),
        (lambda m: m.generate("w1", batch_size=0), "batch_size is 0; expected at least 1 prompt"),
        (lambda m: m.score("w1"), "at least one response"),
        (lambda m: m.score("w1", "w2", ""), r"responses\[1\]: "),
        (lambda m: m.generate([{"role": "user", "content": "w1"}]), "no chat template"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message, model):
    with pytest.raises(qstar.InputError, match=message):
        call(model)


def test_long_texts_are_not_truncated_but_warned_of(model):
    with pytest.warns(UserWarning, match="exceed the model's context of 256"):
        scores = model.score("w1 " * 300, "w2")
    assert scores[0].prompt.count("w1") == 300


def test_a_model_without_reference_needs_one(hf_folder):
    base = qstar.load(hf_folder)
    with pytest.raises(qstar.InputError, match=r"name one with qstar_jax.load\(..., reference=...\)"):
        base.score("w1", "w2")
    with pytest.warns(UserWarning, match="policy and reference are identical: every reward is 0") as caught:
        same = qstar.load(hf_folder, reference=hf_folder, beta=0.1).score("w1", "w2")
    assert same[0].reward == (0.0, 0.0) and [entry.filename for entry in caught] == [__file__]
    assert "Every reward is 0" in same.to_html() and 'class="legend"' not in same.to_html()
    with pytest.raises(qstar.InputError, match="contradict"):
        qstar.load(hf_folder, dtype="bfloat16", compute=DpoConfig("m", "o").compute)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1, "bta": 2}, "option 'bta' is unknown: expected some of compute__attention, "),
        ({"name": "ipo"}, "ambiguous: it may be data__name or loss__name or optimizer__name"),
    ],
)
def test_options_are_found_by_their_last_names(options, message):
    base = DpoConfig("m", "o")
    with pytest.raises(qstar.InputError, match=message):
        with_options(base, options)
    config = with_options(base, {"loss": "ipo", "optimizer": "rmsprop", "rank": 4, "data__layout": "plain"})
    assert (config.loss.name, config.optimizer.name, config.lora.rank, config.data.layout) == (
        "ipo", "rmsprop", 4, "plain",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([PAIRS[0], {"prompt": {1}}], r"pairs\[1\]: Object of type set is not JSON serializable"),
        ([("a", "b", "c")], r"pairs\[0\] is a tuple: expected a dictionary, such as {'prompt'"),
        ({"prompt": ["a"]}, "pairs is a dictionary: expected a list of rows, each a dictionary"),
        ([], "pairs has no rows"),
    ],
)
def test_what_are_no_rows_is_refused_before_a_file_is_written(pairs, message, tmp_path):
    with pytest.raises(qstar.InputError, match=message):
        qstar.dpo("nowhere", pairs, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_training_refuses_is_said_in_the_words_of_python(hf_folder):
    pairs = [*PAIRS[:2], {"prompt": "w1", "chosen": "w2"}]
    with pytest.raises(qstar.InputError) as caught:
        qstar.dpo(hf_folder, pairs, max_length=64, max_prompt_length=32)
    assert "pairs[2]: no key 'rejected' (found: 'prompt', 'chosen'); expected prompt" in str(caught.value)
    assert "name yours with rejected=..." in str(caught.value) and "jsonl" not in str(caught.value)
    with pytest.raises(qstar.InputError, match=r"; simpo reads it: set loss='simpo', or leave it out"):
        qstar.dpo(hf_folder, PAIRS, gamma=1.0)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("drop bad rows with --data.bad_rows drop", "drop bad rows with bad_rows='drop'"),
        ("drop the column with --data.tools null", "drop the column with tools=None"),
        ("make chats with --data.as_chat, or not", "make chats with as_chat=True, or not"),
        ("name yours with --data.rejected; or not", "name yours with rejected=...; or not"),
        ("with --data.turns last learns it", "with turns last learns it"),
        ("train.keep_best loss needs data.eval, rows", "keep_best loss needs eval_pairs, rows"),
        ("data.name 3 and optimizer.name lion", "data__name 3 and optimizer lion"),
        ("runs/a.jsonl row 3, 9: too long", "pairs[2], pairs[8]: too long"),
        ("runs/a.jsonl is empty; model.safetensors", "pairs is empty; model.safetensors"),
        ("/home/user/loss.name.txt row 3", "/home/user/loss.name.txt row 3"),
    ],
)
def test_options_and_rows_in_the_words_of_python(said, expected):
    words = in_python(DpoConfig("m", "o"), {"runs/a.jsonl": "pairs"}, {"data.eval": "eval_pairs"})
    with pytest.raises(qstar.InputError) as caught, words:
        raise qstar.InputError(said)
    assert str(caught.value) == expected


def test_records_print_in_a_few_lines(model):
    scores = model.score("w1 w2", "w11 w3", "w21 w4 w5")
    lines = repr(scores).splitlines()
    assert lines[0] == "Scores of" and len(lines) == 3 and max(map(len, lines)) < 120
    assert lines[2] == f"  <answer 'w21 w4 w5 [EOS]': 4 tokens, reward {scores[1].total_reward:+.3f}>"
    batch = qstar.token_batch([[2, 3]] * 50, [([4] * 90, [5])] * 50)
    assert "tokens (" in repr(batch) and "index (50, 2, 96)" in repr(batch) and len(repr(batch)) < 500
    assert all(len(str(inspect.signature(function))) < 450 for function in (qstar.token_batch, qstar.dpo, qstar.load))


# In a notebook


def test_scores_show_themselves_in_a_frame_of_their_own(model):
    shown = model.score("w1 <script>alert(1)</script>", "w2")._repr_html_()
    assert shown.count("<") == 2 and shown.startswith("<iframe") and 'sandbox="allow-scripts"' in shown
    page = html.unescape(re.search(r'srcdoc="([^"]*)"', shown).group(1))
    assert page.startswith("<!doctype html>") and "<script>alert" not in page


def test_answers_show_themselves_as_a_table(model):
    answers = model.generate(["w1", "w2"], beams=2, return_sequences=2, max_new_tokens=4)
    shown = answers._repr_html_()
    assert shown.count("<tbody") == 2 and shown.count("<tr>") == 1 + 2 + 4 and "reward" not in shown
    assert "reward" in model.generate("w1", beams=2, report_reference=True, max_new_tokens=2)._repr_html_()
    hostile = qstar.Answers(("<b>",), answers.generations[:1])
    assert "<b>" not in hostile._repr_html_()


def test_curves_are_redrawn_while_a_run_trains(hf_folder, tmp_path, on_devices, monkeypatch):
    from qstar_jax.training.run import train

    drawn = []
    config = with_options(
        DpoConfig(str(hf_folder), str(tmp_path)), {"steps": 3, "log_every": 1, "reference_samples": 0}
    )
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    config = with_options(config, {"data__train": str(path), "batch_size": 4})
    with on_devices(1):
        train(config, watch=lambda: drawn.append((tmp_path / "metrics.jsonl").read_text().count("\n")))
    assert drawn == [1, 2, 3]


def test_a_file_is_read_where_it_lies(run, tiny_tokenizer):
    data = load_examples(str(run.out / "train.jsonl"), "", "preferences", tiny_tokenizer, DpoConfig("m", "o").data)
    assert len(data.examples) == 8


@pytest.mark.slow
def test_a_function_is_a_reward(hf_folder, tmp_path, on_devices):
    prompts = [{"prompt": row["prompt"]} for row in PAIRS]
    options = {"max_new_tokens": 4, "samples_per_prompt": 2, "steps": 2, "batch_size": 4, "log_every": 1}
    with on_devices(1):
        run = qstar.rl(
            hf_folder, prompts, reward=lambda pairs: [-len(text) for _, text in pairs], out=tmp_path / "rl", **options
        )
    assert run.metrics["objective/scores"][1][0] < -4 and run.summary["steps"] == 2
    with pytest.raises(qstar.InputError, match="no built-in task that knows the true reward"), on_devices(1):
        qstar.rl(hf_folder, prompts, out=tmp_path / "other", **options)
