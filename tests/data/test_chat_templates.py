from datetime import datetime

import pytest
from transformers import AutoTokenizer

from qstar_jax.config import DataOptions
from qstar_jax.data.chat_templates import ChatTemplate, adopt_template, find_template
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import resolve_date, tokenize
from qstar_jax.errors import InputError

DIALOGUE = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = {"default": "D" + LOOP, "tool_use": "T" + LOOP, "rag": "R" + LOOP}
TODAY = (
    "  {% if strftime_now is defined %}{% macro day() %}{{ strftime_now('%d %b %Y %H') }}{% endmacro %}"
    "{{ day() }} {% endif %}"
)


@pytest.fixture
def named_tokenizer(character_tokenizer):
    return character_tokenizer(chat_template=dict(NAMED))


def rendered(tokenizer, tools=None, **options):
    return ChatTemplate.find(tokenizer, DataOptions(**options), {tools is not None})(DIALOGUE, tools)


def test_a_dialogue_becomes_text(character_tokenizer):
    tokenizer = character_tokenizer(chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    template = ChatTemplate.find(tokenizer, DataOptions())
    assert template([{"role": "user", "content": "hi"}]) == "<user>hi"


def test_templates_are_chosen_as_transformers_does(named_tokenizer):
    for tools in (None, TOOLS):
        expected = named_tokenizer.apply_chat_template(DIALOGUE, tools=tools, tokenize=False)
        assert rendered(named_tokenizer, tools) == expected == ("Dhi" if tools is None else "Thi")


def test_a_template_by_name_or_from_a_file(named_tokenizer, tmp_path):
    path = tmp_path / "custom.jinja"
    path.write_text("F" + LOOP)
    for tools in (None, TOOLS):
        assert rendered(named_tokenizer, tools, chat_template="rag") == "Rhi"
        assert rendered(named_tokenizer, tools, chat_template=str(path)) == "Fhi"


@pytest.mark.parametrize("choice", ["rag", "tool_use", "default", "file"])
def test_the_choice_becomes_the_default_and_no_template_is_lost(named_tokenizer, choice, tmp_path):
    if choice == "file":
        choice = str(tmp_path / "custom.jinja")
        (tmp_path / "custom.jinja").write_text("F" + LOOP)
    text = find_template(named_tokenizer, choice)
    adopted = adopt_template(named_tokenizer, choice)
    assert named_tokenizer.chat_template == NAMED
    adopted.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == named_tokenizer.get_vocab() and again.eos_token == "[E]"
    for tools in (None, TOOLS):  # transformers must not choose tool_use for dialogues with tools
        assert again.apply_chat_template(DIALOGUE, tools=tools, tokenize=False) == text[0] + "hi"
        assert rendered(again, tools) == rendered(again, tools, chat_template=choice) == text[0] + "hi"
    assert set(again.chat_template.values()) == {*NAMED.values(), text}


def test_a_single_template_is_replaced(chat_tokenizer, tmp_path):
    (tmp_path / "custom.jinja").write_text("F" + LOOP)
    assert adopt_template(chat_tokenizer, str(tmp_path / "custom.jinja")).chat_template == "F" + LOOP
    assert adopt_template(chat_tokenizer, None) is chat_tokenizer


@pytest.mark.parametrize(
    ("templates", "options", "message"),
    [
        (
            NAMED,
            {"chat_template": "ragg"},
            r"'ragg': neither the name of a template nor a file .*: default, rag, tool_use\)",
        ),
        ({"a": "x", "b": "y"}, {}, r"several chat templates but no default .*a, b.*--data.chat_template"),
        (None, {}, "no chat template; use the tokenizer of an instruction-tuned model"),
        (None, {"chat_template": "default"}, r"neither .* \(templates of this tokenizer: none\)"),
        ("Say something.", {}, "the chat template never reads `messages`"),
        ("{% if %}", {}, r"not valid Jinja \(line 1: Expected an expression"),
        (LOOP, {"chat_template_kwargs": {"thinking": True}}, "does not read 'thinking'; it reads nothing"),
        (LOOP + "{{ a }}{{ bos_token }}", {"chat_template_kwargs": {"b": 1}}, "read 'b'; it reads a, bos_token"),
        (LOOP, {"chat_template_kwargs": {"messages": []}}, "'messages' is set by the program"),
        (LOOP, {"chat_template_kwargs": {"add_generation_prompt": True}}, "'add_generation_prompt' is set by"),
        (LOOP + "{{ a }}", {"chat_template_kwargs": {"a": {"b": [print]}}}, "'a' is dict; expected text, numbers"),
        (LOOP, {"date": "2026-01-31"}, "data.date 2026-01-31 has no effect: the chat template prints no date"),
        (TODAY + LOOP, {"date": "31.1.2026"}, "data.date '31.1.2026': expected a date such as 2026-01-31"),
    ],
)
def test_invalid_choices_are_refused(character_tokenizer, templates, options, message):
    tokenizer = character_tokenizer(chat_template=templates)
    with pytest.raises(InputError, match=message):
        tokenize([Record(DIALOGUE, (), 0)], tokenizer, DataOptions(**options))


@pytest.mark.parametrize(
    "options", [{"chat_template": "default"}, {"chat_template_kwargs": {"a": 1}}, {"date": "2026-01-31"}]
)
def test_options_without_a_chat(chat_tokenizer, options):
    with pytest.raises(InputError, match=f"data.{next(iter(options))} has no effect: no row is a chat"):
        tokenize([Record("a", ("b",), 0)], chat_tokenizer, DataOptions(**options))


def test_arguments_reach_the_template(character_tokenizer):
    text = "{% if enable_thinking is defined and not enable_thinking %}no {% endif %}{{ documents }}" + LOOP
    tokenizer = character_tokenizer(chat_template=text)
    arguments = {"enable_thinking": False, "documents": [{"title": "t", "text": "x"}]}
    expected = tokenizer.apply_chat_template(DIALOGUE, tokenize=False, **arguments)
    assert rendered(tokenizer, chat_template_kwargs=arguments) == expected
    assert expected.startswith("no ") and not rendered(tokenizer).startswith("no ")
    marked, bare = "{% generation %}" + LOOP + "{% endgeneration %}", LOOP
    assert rendered(character_tokenizer(chat_template=marked)) == rendered(character_tokenizer(chat_template=bare))


def test_a_template_prints_the_date_of_the_options(character_tokenizer):
    tokenizer = character_tokenizer(chat_template="\n" + TODAY + LOOP + "\n")
    now = rendered(tokenizer)
    assert now == tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    then = rendered(tokenizer, date="2024-02-29")
    assert then == now.replace(datetime.now().strftime("%d %b %Y %H"), "29 Feb 2024 00")
    assert rendered(tokenizer, date="2023-05-01") == then.replace("29 Feb 2024", "01 May 2023")
    assert rendered(tokenizer) == tokenizer.apply_chat_template(DIALOGUE, tokenize=False) != then


def test_today_is_recorded_only_if_the_template_prints_a_date(character_tokenizer):
    chats, texts, today = [Record(DIALOGUE, (), 0)], [Record("hi", (), 0)], datetime.now().date().isoformat()
    with_date = character_tokenizer(chat_template=TODAY + LOOP)
    for tokenizer, records, date in ((with_date, chats, today), (with_date, texts, None)):
        assert resolve_date(DataOptions(), records, tokenizer).date == date
    assert resolve_date(DataOptions(date="2024-02-29"), chats, with_date).date == "2024-02-29"
    assert resolve_date(DataOptions(), chats, character_tokenizer(chat_template=LOOP)) == DataOptions()
    named = character_tokenizer(chat_template={"default": LOOP, "today": TODAY + LOOP})
    assert resolve_date(DataOptions(), chats, named).date is None
    assert resolve_date(DataOptions(chat_template="today"), chats, named).date == today


def test_a_template_that_fails_makes_the_row_bad(character_tokenizer):
    for text, reason in (
        ("{{ raise_exception('no') }}" + LOOP, "no"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
    ):
        with pytest.raises(BadRow, match=rf"the chat template refuses the messages \({reason}"):
            rendered(character_tokenizer(chat_template=text))
