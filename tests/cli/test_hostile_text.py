"""Text that would act: no page runs it, and no terminal obeys it. Model, rows, columns and file names all hold it."""

import json
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qstar_jax as qstar
from qstar_jax.cli.main import main
from qstar_jax.cli.view import make_app
from qstar_jax.config import ViewConfig
from qstar_jax.report.embedded import answers_table
from qstar_jax.store import hub

EVIL = (
    "<script>alert(1)</script>",
    '"onmouseover="alert(2)',
    "</style></textarea><img/src=x/onerror=alert(3)>",
    "<!--<iframe/srcdoc='&lt;script>alert(4)'>",
    "javascript:alert(5)",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b31m\x9d0;c1\x9c",
    "\u202eolleh\u202c\u2066x\u2069",
    "ze\u200bro\ufeff\u2060",
    "[bold]{{7*7}}[/bold]",
    "\x08\x0b\x7f",
)
NAME = "\x1b[31m\u202e<img src=x onerror=alert(6)>"
ACTS = {"Cc", "Cf", "Cs", "Zl", "Zp"}
SIGNS = ("␛[31mred", "⟨U+202E⟩olleh⟨U+202C⟩⟨U+2066⟩x⟨U+2069⟩", "ze⟨U+200B⟩ro⟨U+FEFF⟩", "⟨U+009B⟩31m")


def acting(text):
    """What acts on a terminal or hides on a page."""
    return [c for c in text if c not in "\n\t" and unicodedata.category(c) in ACTS]


class Page(HTMLParser):
    """The scripts, event handlers, links and texts of a page; what fields of forms hold stays as it was typed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.scripts, self.fields, self.seen, self.texts = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not acting("".join(self.texts)), acting("".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.seen.append(tag)
        is_field = tag == "input"
        for name, value in attributes:
            assert not name.startswith("on") and name != "srcdoc", (tag, name)
            assert name not in ("src", "href", "action") or re.match(r"data:image|#|/$", value), (tag, value)
            (self.fields if is_field else self.texts).append(value or "")
        if tag in ("input", "img", "meta", "br", "link"):
            self.open.pop()

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        tag = self.open[-1] if self.open else ""
        {"script": self.scripts, "textarea": self.fields}.get(tag, self.texts).append(text)

    def handle_comment(self, text):
        raise AssertionError(text)


def check_page(html, *signs):
    """Checks that a page has only its own scripts, and shows the text; returns what it consists of."""
    page = Page(html)
    assert len(page.scripts) == page.seen.count("script") <= 2 and "alert(" not in "".join(page.scripts)
    assert not {"iframe", "object", "embed", "base"} & set(page.seen)
    shown = "".join(page.texts)
    assert all(sign in shown for sign in signs), shown
    return page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, tiny_model, tiny_params):
    """Folder of a model that can say nothing else, and rows of it."""
    place = tmp_path_factory.mktemp("hostile")
    words = [f"{EVIL[i % len(EVIL)]}{i}" for i in range(56)]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    hub.write_folder(place / f"model {NAME}", tiny_model, tiny_params, tokenizer, "float32")
    row = {"prompt": " ".join(words[:12]), "chosen": " ".join(words[12:24]), "rejected": " ".join(words[24:36])}
    rows = [row | {"oops": [words[24 + i]], "kind": words[i], NAME: words[5]} for i in range(12)]
    (place / f"rows {NAME}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / f"model {NAME}", place / f"rows {NAME}.jsonl", row


@pytest.fixture
def shown(capfd, one_device_only):
    """`shown(code, *words)` runs a command, and returns what it printed, of which nothing acts."""

    def run(code, *words):
        try:
            ended = main([*map(str, words)])
        except SystemExit as error:
            ended = error.code
        out, err = capfd.readouterr()
        assert ended == code, err
        assert not acting(out + err), acting(out + err)
        return out + err

    return run


@pytest.mark.parametrize("verb", ["data", "data with a model", "generate", pytest.param("dpo", marks=pytest.mark.slow)])
def test_verbs_print_nothing_that_acts(verb, hostile, shown, tmp_path):
    model, rows, _ = hostile
    common = ["--model", model, "--data.cache", "false", "--out", tmp_path / f"out {NAME}"]
    few = ["--data.max_eval_rows", "2", "--decode.max_new_tokens", "6"]
    steps = ["--train.steps", "1", "--train.batch_size", "2", "--train.reference_samples", "0"]
    said = shown(
        0,
        *{
            "data": ["data", rows],
            "data with a model": ["data", rows, "--model", model],
            "generate": ["generate", *common, "--data.eval", rows, *few],
            "dpo": ["dpo", *common, "--data.train", rows, *steps],
        }[verb],
    )
    assert all(sign in said for sign in SIGNS), said


def test_errors_print_nothing_that_acts(hostile, shown, tmp_path):
    model, rows, row = hostile
    dpo = ["dpo", "--model", model, "--out", tmp_path / "out", "--data.cache", "false", "--train.steps", "1"]
    assert "␛[31m⟨U+202E⟩<img" in shown(2, *dpo, "--data.train", f"{rows}x")
    assert "found:" in shown(2, *dpo, "--data.train", rows, "--data.prompt", f"no {NAME}")
    bad = tmp_path / f"bad {NAME}.jsonl"
    bad.write_text(json.dumps(row | {"prompt": [{"role": NAME}]}) + "\n")
    assert "␛[31m" in shown(2, *dpo, "--data.train", bad)
    bad.write_text('{"\x1b[31m\u202e": \x9b\n')
    shown(2, *dpo, "--data.train", bad)
    trl = tmp_path / f"trl {NAME}.yaml"
    trl.write_text(json.dumps({"model_name_or_path": str(model), "run_name": NAME, "dataset_name": NAME, NAME: NAME}))
    assert "has no option" in shown(2, "dpo", "--from_trl", trl, "--no_such", NAME)


def test_chat_prints_nothing_that_acts(hostile, shown, monkeypatch):
    typed = iter([f"{EVIL[5]}5", f"/{NAME}"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed, "/quit"))
    said = shown(0, "chat", hostile[0], "--decode.max_new_tokens", "8")
    assert "⟨U+" in said and "␛[31m⟨U+202E⟩<img" in said


@pytest.mark.filterwarnings("ignore:Glyph")
def test_pages_and_terminal_of_score_and_report(hostile, shown, tmp_path):
    model, rows, _ = hostile
    scores, out = tmp_path / f"scores {NAME}", tmp_path / f"out {NAME}"
    words = ["score", "--model", model, "--reference", model, "--beta", "0.1", "--data.eval", rows, "--out", scores]
    said = shown(0, *words, "--wrong", "oops", "--data.cache", "false")
    assert all(sign in said for sign in SIGNS), said
    check_page((scores / "heatmap.html").read_text(), *SIGNS, "<script>alert(1)</script>", NAME[6:])
    assert "␛[31m" in shown(0, "report", "--credit", scores, "--out", out, "--title", NAME)
    page = check_page((out / "report.html").read_text(), *SIGNS, "<script>alert(1)</script>")
    assert page.seen.count("svg") == page.seen.count("polyline") > 0


def test_pages_of_view_and_notebooks(hostile):
    testclient = pytest.importorskip("starlette.testclient", reason="needs the extra `view`")
    pytest.importorskip("python_multipart", reason="needs the extra `view`")
    folder, _, row = hostile
    model = qstar.load(folder, reference=folder, beta=0.1)
    app = make_app(model, ViewConfig(model.source, beams=2, max_new_tokens=4, alternatives=2))
    client = testclient.TestClient(app, base_url="http://127.0.0.1")
    for form in ({"score": "1"}, {"beams": "1"}):
        page = check_page(client.post("/", data={"prompt": row["prompt"], "response": row["chosen"], **form}).text)
        assert row["chosen"] in "".join(page.fields)  # what was typed stays, to be sent again
    page = check_page(client.post("/", data={"prompt": row["prompt"], "response": "", "score": "1"}).text)
    check_page(answers_table([row["prompt"]], model.generate([row["prompt"]], max_new_tokens=6)), *SIGNS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
def test_sweep_its_files_for_alpaca_eval_and_its_report(hostile, shown, tmp_path):
    model, rows, _ = hostile
    out = tmp_path / f"sweep {NAME}"
    words = ["sweep", "--model", model, "--reference", model, "--beta", "0.1", "--data.eval", rows, "--out", out]
    words += ["--judge.kind", "reward_model", "--judge.model", model, "--judge.reference", model, "--judge.beta", "1"]
    words += ["--widths", "[2]", "--seeds", "[0]", "--max_new_tokens", "6", "--export", "--data.cache", "false"]
    assert "␛[31m⟨U+202E⟩<img" in shown(0, *words)
    folders = [path.parent for path in (out / "alpaca_eval").rglob("annotations.json")]
    assert len(folders) == 3 and all(out / "alpaca_eval" in folder.parents for folder in folders)
    [greedy] = json.loads((out / "alpaca_eval" / model.name / "greedy" / "model_outputs.json").read_text())
    assert any(evil in greedy["output"] for evil in EVIL)  # data stay as they are
    shown(0, "report", "--sweep", out, "--out", tmp_path / "report")
    check_page((tmp_path / "report" / "report.html").read_text(), NAME[6:])


@pytest.mark.filterwarnings("ignore:Glyph")
def test_decline_and_its_report(shown, tmp_path):
    run, out = tmp_path / f"run {NAME}", tmp_path / f"out {NAME}"
    run.mkdir()
    lines = [
        {"step": s, **{f"eval_rewards/{kind}": -0.1 * s for kind in ("chosen", "rejected", "margins")}} for s in (0, 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {NAME: 1.0}) + "\n" for line in lines))
    (run / "config.yaml").write_text(json.dumps({"loss": {"name": "sigmoid", "beta": 0.1}, "model": NAME}))
    (run / "summary.json").write_text(json.dumps({"verdict": " ".join(EVIL)}))
    said = shown(0, "decline", "--with_sft", run, "--out", out)
    assert all(sign in said for sign in SIGNS), said
    shown(0, "report", "--decline", out, "--out", tmp_path / "report")
    check_page((tmp_path / "report" / "report.html").read_text())
    (run / "config.yaml").write_text(json.dumps({"loss": {"name": NAME, "beta": 0.1}}))
    assert "is unknown" in shown(2, "decline", "--with_sft", run, "--out", out)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_select_and_its_report(hostile, shown, tmp_path):
    rows, out = tmp_path / f"answers {NAME}.jsonl", tmp_path / f"out {NAME}"
    lines = [
        {"prompt": EVIL[q], "completion": f"{EVIL[q]} # {EVIL[(q + n) % 12]}", NAME: f"# {EVIL[q]}"}
        for q in range(12)
        for n in range(4)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["select", "--data.eval", rows, "--data.cache", "false"]
    shown(0, *words, "--right", NAME, "--out", out)
    shown(0, "report", "--selection", out, "--out", tmp_path / "report")
    check_page((tmp_path / "report" / "report.html").read_text())
    assert "␛[31m" in shown(2, *words, "--right", f"no {NAME}", "--out", tmp_path / "other")
    pattern = ["--final_answer", "pattern", "--pattern", f"({NAME}"]
    assert "no regular expression" in shown(2, *words, *pattern, "--out", tmp_path / "other")


@pytest.mark.slow
def test_play(hostile, shown, tmp_path, monkeypatch):
    pytest.importorskip("textarena", reason="games need the extra `textarena`")
    from qstar_jax.evaluation import play

    class Game:
        def __init__(self):
            self.messages, self.reward, self.turns, self.reason = [{"role": "user", "content": EVIL[5]}], None, 0, ""

        def say(self, text):
            self.messages.append({"role": "assistant", "content": text})
            self.turns, self.reward, self.reason = 1, 0.0, " ".join(EVIL)

    model, _, _ = hostile
    assert "␛[31m" in shown(2, "play", "--model", model, "--out", tmp_path / "other", "--game", NAME)
    monkeypatch.setattr(play, "Game", lambda *_: Game())
    words = [
        "play",
        "--model",
        model,
        "--games",
        "2",
        "--decode.max_new_tokens",
        "4",
        "--out",
        tmp_path / f"out {NAME}",
    ]
    said = shown(0, *words, "--game", "GuessTheNumber-v0")
    assert "<script>alert(1)</script>" in said
