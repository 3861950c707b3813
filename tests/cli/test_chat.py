"""`qstar chat`: a conversation from a script of lines."""

import copy

import jax
import pytest

import qstar_jax as qstar
from qstar_jax.cli.main import main
from qstar_jax.store import hub


@pytest.fixture
def chat(monkeypatch, capsys):
    """`chat(model, lines, *words)` types lines, and returns what was shown after each, and the exit code."""

    def run(model, lines, *words):
        typed, shown = iter(lines), []

        def answer(*_):
            shown.append(capsys.readouterr().out)
            if (line := next(typed, None)) is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", answer)
        code = main(["chat", str(model), "--decode.max_new_tokens", "4", *words])
        captured = capsys.readouterr()
        return [*shown[1:], captured.out], captured.err, code

    return run


def said(text):
    """A reply without the prompt of the next line, and without the sign that it was too long."""
    return text.strip().removesuffix(">").strip().removesuffix(" …")


def reply_to(model, *texts):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return model.generate([messages], max_new_tokens=4)[0][0].text


def test_a_conversation_goes_on(picky_folder, chat):
    model = qstar.load(picky_folder)
    first, second = reply_to(model, "w1 w2"), reply_to(model, "w1 w2", reply_to(model, "w1 w2"), "w3")
    again = reply_to(model, "w3")
    assert again != second  # or the test could not tell
    shown, _, code = chat(picky_folder, ["w1 w2", "w3", "/undo", " w3", "/reset", "w3", ""])
    assert code == 0
    for text, expected in zip(shown, [first, second, "", second, "", again, "", ""], strict=True):
        assert said(text) == expected


def test_what_the_model_cannot_read_does_not_end_it(picky_folder, chat):
    shown, _, code = chat(picky_folder, ["w0", "/nothing", "w1", "/quit", "w2"])
    assert code == 0 and len(shown) == 4
    assert "w0 is no word" in shown[0] and "/nothing is no command" in shown[1]
    assert said(shown[2]) == reply_to(qstar.load(picky_folder), "w1")


def test_a_system_message_and_a_method_change_the_reply(picky_folder, chat):
    plain, *others = (
        chat(picky_folder, ["w1 w2"], *words)[0][0]
        for words in ([], ["--system", "w9"], ["--decode.method", "sample", "--decode.seed", "3"])
    )
    assert all(other != plain for other in others)


def test_rewards_are_shown(picky_folder, tiny_model, tiny_params, tiny_tokenizer, tmp_path, chat):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    hub.write_folder(tmp_path / "ref", tiny_model, jax.tree.map(lambda x: x * 0.9, tiny_params), tokenizer, "float32")
    words = ["--rewards", "--reference", str(tmp_path / "ref"), "--beta", "0.5"]
    [shown, _], _, _ = chat(picky_folder, ["w1 w2"], *words)
    model = qstar.load(picky_folder, reference=tmp_path / "ref", beta=0.5)
    messages = [{"role": "user", "content": "w1 w2"}]
    [scored] = model.score(messages, [{"role": "assistant", "content": reply_to(model, "w1 w2")}])
    assert f"reward {scored.total_reward:+.3f}" in shown and scored.total_reward != 0


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--beta", "0.1"], "no effect without --rewards"), (["--rewards"], "has no reference")],
)
def test_what_has_no_effect_is_refused(words, message, picky_folder, chat):
    shown, error, code = chat(picky_folder, ["w1"], *words)
    assert message in error if code else message in shown[0]


def test_a_model_without_template_is_named(hf_folder, chat):
    shown, _, _ = chat(hf_folder, ["w1"])
    assert "the tokenizer has no chat template" in shown[0]
