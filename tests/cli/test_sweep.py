import json
import shutil

import pytest
import yaml

from qstar_jax.cli.main import main
from qstar_jax.decoding.generations_file import read_generations
from qstar_jax.errors import InputError
from qstar_jax.evaluation.insights.sweep.measure import _names

pytestmark = pytest.mark.usefixtures("one_device_only")


def sweep(out, *words):
    return main(["sweep", "--out", str(out), "--max_new_tokens", "6", "--widths", "[2,3]", *map(str, words)])


def record(out):
    return json.loads((out / "sweep.json").read_text())


@pytest.fixture(scope="module")
def swept(dpo_run, eval_file, tmp_path_factory, on_devices):
    """A sweep of the run, judged by its own implicit reward, with the words that made it."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    words = ["--model", dpo_run, "--data.eval", eval_file, "--judge.kind", "reward_model", "--judge.model", dpo_run]
    words += ["--seeds", "[0,1]", "--export"]
    with on_devices(1):
        assert sweep(out, *words) == 0
    return out, words


def test_every_setting_is_decoded_scored_and_judged(swept, dpo_run):
    out, _ = swept
    found = record(out)
    (run,) = found["runs"]
    assert [(p["decoder"], p["width"]) for p in run["points"]] == [
        ("sampled", 1), ("greedy", 1), ("beam", 2), ("beam", 3)
    ]  # fmt: skip
    assert run["beta"] == 0.3 and found["seeds"] == [0, 1] and found["prompts"] > 1
    assert found["judge"].startswith("reward model")
    assert set(run["differences"]) == {"3 beams - sampled", "3 beams - greedy"}
    lines = [json.loads(line) for line in (out / "comparisons.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * found["prompts"]  # two seeds
    assert (out / "sweep.png").stat().st_size > 1000


def test_figures_are_those_of_the_answers(swept, dpo_run):
    out, _ = swept
    (run,) = record(out)["runs"]
    answers = read_generations(out / dpo_run.name / "beams-3")
    point = next(p for p in run["points"] if p["width"] == 3)
    assert point["length"]["mean"] == pytest.approx(sum(a["length"] for a in answers) / len(answers))
    assert point["logp"]["mean"] == pytest.approx(sum(a["logp"] for a in answers) / len(answers), abs=1e-4)
    assert point["truncated"] == sum(a["finish"] == "length" for a in answers) / len(answers)
    # The judge's reward of an answer is the implicit reward that the sweep has measured itself.
    lines = [json.loads(line) for line in (out / "comparisons.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["decoder"] == "beam" and line["width"] == 3 and not line["truncated"]]
    for line in own:
        assert line["verdict"]["answer_score"] == pytest.approx(line["implicit_reward"], abs=1e-4)


def test_wider_beams_find_answers_that_are_at_least_as_likely(swept):
    points = {(p["decoder"], p["width"]): p["logp"]["mean"] for p in record(swept[0])["runs"][0]["points"]}
    assert points["sampled", 1] < points["greedy", 1] <= points["beam", 3] + 1e-5


def test_verdicts_are_exported_for_alpaca_eval(swept, dpo_run):
    out, _ = swept
    path = out / "alpaca_eval" / dpo_run.name / "beams-3" / "annotations.json"
    preferences = [annotation["preference"] for annotation in json.loads(path.read_text(encoding="utf-8"))]
    point = next(p for p in record(out)["runs"][0]["points"] if p["width"] == 3)
    assert len(preferences) == record(out)["prompts"]
    assert sum(preferences) / len(preferences) - 1 == pytest.approx(point["win_rate"]["mean"])


def test_what_was_answered_is_not_answered_again(swept, monkeypatch, dpo_run):
    out, words = swept
    before = record(out)
    path = out / dpo_run.name / "greedy" / "generations.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    prepared = []
    from qstar_jax.evaluation import trials

    monkeypatch.setattr(trials, "prepare", lambda *args, real=trials.prepare: prepared.append(args[1]) or real(*args))
    assert sweep(out, *words) == 0
    assert [plan.block.method for plan in prepared] == ["greedy"]
    assert record(out) == before and path.read_text().splitlines(keepends=True) == lines


def test_other_settings_are_refused_in_the_same_folder(swept, capsys):
    out, words = swept
    assert main(["sweep", "--out", str(out), "--max_new_tokens", "7", *map(str, words)]) == 2
    assert "holds responses with decode.max_new_tokens 6, and it is 7 now" in capsys.readouterr().err


def test_answers_of_another_model_or_to_other_prompts_are_refused_before_any_is_made(
    swept, dpo_run, eval_file, tmp_path, monkeypatch, capsys
):
    out, words = swept
    monkeypatch.setattr("qstar_jax.evaluation.trials.prepare", None)  # a call would raise
    copied = shutil.copytree(out, tmp_path / "model")
    (copied / dpo_run.name / "sampled-0" / "generations.jsonl").unlink()  # would be answered first
    identity = copied / dpo_run.name / "beams-3" / "generations.identity.json"
    stored = json.loads(identity.read_text())
    stored["model"]["parameters"] = "0" * 64
    identity.write_text(json.dumps(stored))
    assert sweep(copied, *words) == 2
    assert "beams-3 holds responses made with model.parameters 000000000000..., and" in capsys.readouterr().err
    # The file of prompts was changed in place: as if the answers had been made with it.
    lines = eval_file.read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(lines[::-1]))
    copied = shutil.copytree(out, tmp_path / "prompts")
    for settings in copied.glob("*/*/config.yaml"):
        settings.write_text(settings.read_text().replace(str(eval_file), str(other)))
    assert sweep(copied, *[other if word == eval_file else word for word in words]) == 2
    assert "responds to another prompt in row 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--widths", "[1]"], "--widths [1]: expected"),
        ([], "--data.eval is missing"),
        (["--data.eval", "{eval}"], "judge"),  # no reward model is named
        (["--data.eval", "{eval}", "--judge.kind", "true_reward"], "true_reward"),
        (["--model", "[{run},{run}]", "--data.eval", "{eval}"], "several different runs"),
    ],
)
def test_bad_input_is_told_before_anything_is_decoded(words, message, dpo_run, eval_file, tmp_path, capsys):
    words = [word.format(run=dpo_run, eval=eval_file) for word in words]
    assert main(["sweep", "--model", str(dpo_run), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_run_takes_the_place_of_another_of_the_same_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "c")
    runs = [str(tmp_path / place / "dpo" / "final") for place in ("a", "b")]
    assert _names(runs) == dict(zip(("a-dpo-final", "b-dpo-final"), runs, strict=True))
    assert list(_names([f"{runs[0]}/../final", str(tmp_path / "c")])) == ["final", "c"]
    with pytest.raises(InputError, match="several different runs"):
        _names([str(tmp_path / "c"), str(tmp_path / "link")])


def test_several_runs_are_named_apart_and_rows_that_are_not_tried_are_named(dpo_run, eval_file, tmp_path, capsys):
    first, second = eval_file.read_text().splitlines(keepends=True)[:2]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(first + first + second)
    runs = [shutil.copytree(dpo_run, tmp_path / place / "run") for place in ("a", "b")]
    words = ["--model", yaml.safe_dump([str(run) for run in runs], default_flow_style=True).strip()]
    words += ["--data.eval", rows, "--judge.kind", "reward_model", "--judge.model", runs[0]]
    assert sweep(tmp_path / "out", "--seeds", "[0]", *words) == 0
    found = record(tmp_path / "out")["runs"]
    assert [run["name"] for run in found] == ["a-run", "b-run"] and found[0]["points"] == found[1]["points"]
    assert record(tmp_path / "out")["prompts"] == 2
    assert all(run["unused_rows"] == {"prompt of an earlier row": [1]} for run in found)
    assert "3 rows read, 2 used; 1 dropped: 1 prompt of an earlier row (row 2)" in capsys.readouterr().out
    lines = read_generations(tmp_path / "out" / "a-run" / "greedy")
    assert [(line["row"], line["finish"] == "dropped", line["reason"]) for line in lines] == [
        (0, False, None), (1, True, "prompt of an earlier row"), (2, False, None)
    ]  # fmt: skip
    identity = json.loads((tmp_path / "out" / "sweep.identity.json").read_text())["models"]
    assert identity["a-run"] == identity["b-run"] and identity["a-run"]["beta"] == 0.3


def test_measurements_become_one_page(swept, dpo_run, eval_file, tmp_path, capsys):
    out, _ = swept
    assert main(["decline", "--with_sft", str(dpo_run), "--out", str(tmp_path / "decline")]) == 0
    (run,) = json.loads((tmp_path / "decline" / "decline.json").read_text())["runs"]
    assert run["name"] == "with SFT" and run["steps"][-1] == 3 and (tmp_path / "decline" / "decline.png").exists()
    marked = tmp_path / "marked.jsonl"
    rows = [json.loads(line) for line in eval_file.read_text().splitlines()]
    marked.write_text("".join(json.dumps(r | {"oops": [[0, len(r["rejected"].split()[0])]]}) + "\n" for r in rows))
    words = [
        "score",
        "--model",
        str(dpo_run),
        "--data.eval",
        str(marked),
        "--wrong",
        "oops",
        "--out",
        str(tmp_path / "c"),
    ]
    assert main(words) == 0
    credit = json.loads((tmp_path / "c" / "credit.json").read_text())
    assert credit["wrong_tokens"] == credit["answers"] and 0 <= credit["detectors"]["implicit reward"]["mean"] <= 1
    folders = ["--sweep", str(out), "--decline", str(tmp_path / "decline"), "--credit", str(tmp_path / "c")]
    assert main(["report", "--out", str(tmp_path / "page"), *folders]) == 0
    summary = json.loads((tmp_path / "page" / "summary.json").read_text())
    assert [v["insight"] for v in summary["verdicts"]] == ["credit", "search", "decline"]
    page = (tmp_path / "page" / "report.html").read_text()
    assert all(verdict["measured"][:20] in page for verdict in summary["verdicts"])
    assert {p.name for p in (tmp_path / "page").glob("*.png")} == {"credit.png", "sweep.png", "decline.png"}
    # Each part can be missing.
    assert main(["report", "--out", str(tmp_path / "part"), "--decline", str(tmp_path / "decline")]) == 0
    assert len(json.loads((tmp_path / "part" / "summary.json").read_text())["verdicts"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a folder to show with --credit, --sweep, --decline, --control, --dialogue, "),
        (["--sweep", "{tmp}"], "sweep.json: no such file; --sweep expects a folder that `qstar sweep` wrote"),
        (["--credit", "{tmp}"], "`qstar score --wrong COLUMN` wrote"),
    ],
)
def test_a_report_of_nothing_is_refused(words, message, tmp_path, capsys):
    words = [word.format(tmp=tmp_path) for word in words]
    assert main(["report", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


def test_decline_of_no_run_is_refused(tmp_path, capsys):
    assert main(["decline", "--out", str(tmp_path / "out")]) == 2
    assert "--with_sft, --without_sft or both" in capsys.readouterr().err
