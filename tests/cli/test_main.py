import errno
import io
import os
import sys

import pytest
import yaml

from qstar_jax.cli import main as main_module
from qstar_jax.cli.main import main
from qstar_jax.decoding.options import interpret
from qstar_jax.errors import InputError


@pytest.fixture
def seen(monkeypatch):
    """The options with which a verb would run; nothing is run."""
    found = []
    for verb in ("dpo", "sft", "score", "generate"):
        monkeypatch.setattr(f"qstar_jax.cli.{verb}.run", found.append)
    return found


BASE = ["dpo", "--model", "m", "--out", "o"]


def refused(words, capsys) -> str:
    """What the parser says when it exits with 2."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_options_reach_the_verb(seen):
    assert main([*BASE, "--loss.beta", "0.3", "--data.train=d.jsonl", "--mesh.fsdp", "2", "--train.seed=7"]) == 0
    config = seen[0]
    assert (config.model, config.out, config.loss.beta, config.mesh.fsdp, config.train.seed) == ("m", "o", 0.3, 2, 7)
    assert config.data.train == "d.jsonl" and config.loss.label_smoothing is None and config.resume is False


@pytest.mark.parametrize(("word", "value"), [("--resume", True), ("--resume=true", True), ("--resume=false", False)])
def test_flags_need_no_value(word, value, seen):
    assert main([*BASE, word]) == 0
    assert seen[0].resume is value


def test_a_flag_before_another_option(seen):
    assert main([*BASE, "--resume", "--data.as_chat", "--loss.beta", "0.2"]) == 0
    assert seen[0].resume is True and seen[0].data.as_chat is True and seen[0].loss.beta == 0.2


def test_overrides_of_the_mesh_may_be_given_as_a_dictionary(seen):
    assert main([*BASE, "--mesh.overrides", '{"embed": ["fsdp", null]}']) == 0
    assert seen[0].mesh.overrides == {"embed": ["fsdp", None]}


@pytest.mark.parametrize("words", ['["\\ud83d\\ude42", "\\u3002"]', '["\U0001f642", "\u3002"]', "[\U0001f642, \u3002]"])
def test_an_emoji_may_be_written_as_json_writes_it(words, seen):
    assert main(["generate", "--model", "m", "--out", "o", "--decode.stop", words]) == 0
    assert seen[0].decode.stop == ["\U0001f642", "\u3002"]


def test_arguments_of_chat_templates(seen, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: {chat_template_kwargs: {enable_thinking: false, day: 2026-03-04}, date: 2026-03-04}\n")
    main([*BASE, "--data.chat_template_kwargs", '{"enable_thinking": false, "documents": [{"title": "t"}]}'])
    main([*BASE, "--config", str(file), "--data.chat_template", "rag"])
    assert seen[0].data.chat_template_kwargs == {"enable_thinking": False, "documents": [{"title": "t"}]}
    assert seen[1].data.chat_template_kwargs == {"enable_thinking": False, "day": "2026-03-04"}
    assert (seen[1].data.date, seen[1].data.chat_template) == ("2026-03-04", "rag")


def test_a_file_with_options_and_words_that_win_over_it(seen, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nout: o\nloss:\n  beta: 0.3\n  label_smoothing: 0.1\ntrain: {steps: 5}\n")
    assert main(["dpo", "--config", str(path), "--loss.beta", "0.7", "--out", "other"]) == 0
    config = seen[0]
    assert (config.loss.beta, config.loss.label_smoothing, config.train.steps, config.out) == (0.7, 0.1, 5, "other")


GENERATE = ["generate", "--model", "m", "--out", "o"]
FORMER = "decode: {method: beam, beams: 3, top_k: 0, top_p: 1.0, min_p: 0.0, groups: 1, delimiters: [], seed: 0}\n"


def test_a_file_of_an_earlier_version_may_spell_out_defaults_that_are_not_read(seen, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(FORMER)
    assert main([*GENERATE, "--config", str(path)]) == 0
    decode = seen[0].decode
    assert (decode.method, decode.beams, decode.top_p, decode.delimiters, decode.groups) == ("beam", 3, None, None, 1)
    interpret(decode)


def test_a_flag_that_spells_out_a_default_is_given(seen):
    assert main([*GENERATE, "--decode.method", "beam", "--decode.top_p", "1.0"]) == 0
    with pytest.raises(InputError, match=r"top_p 1\.0 has no effect with method beam"):
        interpret(seen[0].decode)


@pytest.mark.parametrize("words", [["--decode.stochastic"], ["--decode.stochastic", "true"]])
def test_flags_of_variants_need_no_value_either(words, seen):
    assert main([*GENERATE, "--decode.method", "beam", *words]) == 0
    assert seen[0].decode.stochastic is True


def test_print_config_prints_what_config_reads(seen, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main([*BASE, "--loss.beta", "0.3", "--print_config"])
    assert exit_.value.code == 0 and not seen
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert printed["loss"]["beta"] == 0.3 and printed["optimizer"]["learning_rate"] == 1e-6
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    assert main(["dpo", "--config", str(path)]) == 0
    assert seen[0].loss.beta == 0.3 and seen[0].model == "m"


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("--los.beta=1", "--loss.beta"), ("--loss.bta=1", "--loss.beta"), ("--train.batchsize=4", "--train.batch_size")],
)
def test_an_unknown_option_is_answered_with_the_nearest(word, nearest, capsys):
    message = refused([*BASE, word], capsys)
    assert f"nearest known option is {nearest}\n" in message + "\n" and "Traceback" not in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("loss: {bta: 0.2}", "loss.beta"),
        ("optimiser: {learning_rate: 1}", "optimizer"),
        ("train: {step: 1}", "train.steps"),
    ],
)
def test_an_unknown_key_of_a_file_is_answered_with_the_nearest(text, named, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refused([*BASE, "--config", str(path)], capsys)
    assert named in message


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dance"],
        ["dpo", "--out", "o"],
        ["dpo", "--model", "m"],
        [*BASE, "--loss.beta", "much"],
        [*BASE, "--train.steps", "1.5"],
        [*BASE, "--compute.dtype", "float64"],
        [*BASE, "--optimizer.schedule", "none"],
        [*BASE, "--config", "/not/there.yaml"],
        [*BASE, "stray"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(words, capsys):
    assert "error" in refused(words, capsys)


@pytest.mark.parametrize("verb", main_module.VERBS)
def test_every_verb_has_a_module_and_help(verb, capsys):
    import importlib

    assert callable(importlib.import_module(f"qstar_jax.cli.{verb}").run)
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    assert f"usage: qstar {verb}" in capsys.readouterr().out


def test_bad_input_exits_with_2_and_one_plain_line(capsys, tmp_path):
    assert (
        main(["dpo", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "run"), "--data.train", "x.jsonl"]) == 2
    )
    message = capsys.readouterr().err
    assert message.startswith("qstar dpo: ") and "expected a folder or a name on the Hub" in message
    assert "Traceback" not in message and len(message.splitlines()) == 1


def test_an_interrupted_run_says_so_in_one_line(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("qstar_jax.cli.dpo.run", interrupt)
    assert main(BASE) == 130
    assert capsys.readouterr().err == "qstar dpo: interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError, FloatingPointError, OSError, ImportError])
def test_failures_exit_with_1(error, monkeypatch, capsys):
    def fail(config):
        raise error("the disk is full")

    monkeypatch.setattr("qstar_jax.cli.dpo.run", fail)
    monkeypatch.delenv("QSTAR_TRACEBACK", raising=False)
    assert main(BASE) == 1
    assert "qstar dpo: the disk is full" in capsys.readouterr().err
    monkeypatch.setenv("QSTAR_TRACEBACK", "1")
    with pytest.raises(error):
        main(BASE)


@pytest.mark.parametrize(("verb", "more"), [("dpo", " --resume"), ("generate", "")])
def test_a_full_disk_says_how_to_go_on(verb, more, monkeypatch, capsys):
    def fill(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"qstar_jax.cli.{verb}.run", fill)
    assert main([verb, "--model", "m", "--out", "o"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qstar {verb}: [Errno 28] No space left on device\n")
    assert said.endswith(f"make room, and go on with\nqstar {verb} --model m --out o{more}\n")


def test_streams_that_cannot_be_reconfigured(seen, monkeypatch):
    # Notebooks and test harnesses replace the standard output by objects of their own.
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(BASE) == 0


def test_the_process_exits_with_the_code(qstar, tmp_path):
    done = qstar("dpo", "--model", tmp_path, "--out", tmp_path / "run", "--data.train", "x.jsonl")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no config.json" in done.stderr
    assert qstar("env").returncode == 0


def test_env_says_what_a_bug_report_needs(capsys):
    import jax

    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for part in ("qstar_jax", jax.__version__, "tested pairs", "device 7"):
        assert part in text


def test_texts_are_tokenized_on_all_cores_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    for given, expected in ((None, "true"), ("false", "false")):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", given or "")  # so that it is restored afterwards
        if given is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM")
        assert main(["data", str(tmp_path / "nothing.jsonl")]) == 2
        assert os.environ["TOKENIZERS_PARALLELISM"] == expected


@pytest.mark.parametrize("flag", ["--config", "--from_trl"])
def test_options_are_read_from_a_pipe(flag, capsys):
    """As the shell writes them for `--config <(command)`."""
    reading, writing = os.pipe()
    os.write(writing, b"beta: 0.7" if flag == "--from_trl" else b"loss:\n  beta: 0.7")
    os.close(writing)
    with pytest.raises(SystemExit) as stop:
        main(["dpo", flag, f"/dev/fd/{reading}", "--model", "m", "--out", "o", "--print_config"])
    os.close(reading)
    assert stop.value.code == 0
    assert "beta: 0.7" in capsys.readouterr().out


def test_a_device_is_no_file_of_a_group_of_options(capsys):
    assert main(["dpo", "--loss", "/dev/zero", "--model", "m", "--out", "o"]) == 2
    assert "--loss /dev/zero: not a file (found: a device)" in capsys.readouterr().err
