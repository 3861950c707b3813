"""Runs on chats: which chat template they have, and which day it takes for today, is kept with them."""

import datetime
import json
import shutil
from dataclasses import replace

import pytest
import yaml

from qstar_jax.config import ReferenceOptions
from qstar_jax.errors import InputError
from qstar_jax.store.checkpoints import find_checkpoint, read_description

LOOP = "{% for m in messages %}{{ m.content }} [EOS]{% endfor %}"
DATED = "w{{ strftime_now('%d') | int }} " + LOOP


class Clock(datetime.datetime):
    """A clock that is set by hand."""

    day = 4

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 3, cls.day, 23, 59)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, hf_folder):
    """The tiny model with two templates, of which none is the default; its pad and a word are beyond its embedding."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(hf_folder, folder)
    (folder / "additional_chat_templates").mkdir()
    for name, text in (("plain", LOOP), ("dated", DATED)):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": 60, "content": "[PADDING]", "special": True}, {"id": 61, "content": "Zebra", "special": False}]
    tokenizer["added_tokens"] += [token | kind for token in added]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[PADDING]"}))
    return str(folder)


@pytest.fixture
def run(chat_folder, make_config, tiny_train, metric_lines, tmp_path, monkeypatch):
    """Trains into a folder of that name; returns its metrics."""
    monkeypatch.setattr("qstar_jax.data.tokenization.datetime", Clock)
    monkeypatch.setattr(Clock, "day", 4)

    def run(name, choice, resume=False, **data):
        data = {"as_chat": True, "chat_template": choice, **data}
        reference = ReferenceOptions("cached", cache=str(tmp_path / f"cache of {name}"))
        config = make_config(tmp_path / name, data=data, reference=reference, train={"steps": 4})
        tiny_train(replace(config, model=chat_folder, resume=resume))
        return metric_lines(tmp_path / name)

    return run


def kept_date(out):
    options = yaml.safe_load((out / "config.yaml").read_text())
    assert read_description(find_checkpoint(out)).options == options
    return options["data"]["date"]


def test_a_run_goes_on_after_midnight(run, tmp_path):
    lines = run("dated", "dated")
    assert kept_date(tmp_path / "dated") == "2026-03-04"
    Clock.day = 5
    shutil.rmtree(tmp_path / "dated" / "checkpoints" / "4")
    assert run("dated", "dated", resume=True) == lines
    assert kept_date(tmp_path / "dated") == "2026-03-04"
    assert len(list((tmp_path / "cache of dated").iterdir())) == 1
    with pytest.raises(InputError, match=r"data\.date was '2026-03-04' .* and is '2026-03-05' now"):
        run("dated", "dated", resume=True, date="2026-03-05")


def test_a_run_keeps_its_template(run, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(LOOP)
    run("own", str(file))
    assert kept_date(tmp_path / "own") is None
    tokenizer = read_description(find_checkpoint(tmp_path / "own")).build_tokenizer()
    assert tokenizer.chat_template == {"default": LOOP, "plain": LOOP, "dated": DATED}
    assert tokenizer.pad_token_id == 60
    file.write_text(LOOP + " ")
    with pytest.raises(InputError, match=r"--resume: data\.chat_template .*own\.jinja holds another template than the"):
        run("own", str(file), resume=True)


def test_what_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"several chat templates but no default.*dated, plain"):
        run("none", None)
    with pytest.raises(InputError, match=r"the chat template does not read 'style'"):
        run("style", "plain", chat_template_kwargs={"style": "w9"})
    with pytest.raises(InputError, match=r"data\.chat_template has no effect: no row is a chat"):
        run("text", "plain", as_chat=False)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "w1", "chosen": "Zebra", "rejected": "w3"}\n')
    with pytest.raises(InputError, match=r"pairs\.jsonl row 1: the token 'Zebra' has id 61, but the model has only 60"):
        run("word", "plain", train=str(tmp_path / "pairs.jsonl"))


def test_actions_of_dialogues_are_learned_and_tools_are_not(run, tmp_path):
    def row(i):
        asked, called = {"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": "w6 w7"}
        heard, said = {"role": "tool", "content": "w8 w9 w10"}, {"role": "assistant", "content": f"w{i + 11}"}
        return {"chosen": [asked, called, heard, said], "rejected": [asked, {"role": "assistant", "content": "w12"}]}

    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(8)))
    options = {"train": str(tmp_path / "talks.jsonl"), "as_chat": False}
    every, last = (run(turns, "plain", turns=turns, **options)[-1] for turns in ("all", "last"))
    assert [line["lengths/chosen"] for line in (every, last)] == [len("67E") + len("+E"), len("+E")]
    assert every["rewards/margins"] > 0 and every["loss"] != last["loss"]
