"""What a chat template must render: the same prompt before every response, and all words, tools and reasoning."""

import pytest

from qstar_jax.config import DataOptions
from qstar_jax.data.dropped import Dropped
from qstar_jax.data.records import Record
from qstar_jax.data.tokenization import tokenize

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def fault(tokenizer, prompt, *responses):
    """Tokenizes one record, and returns what is wrong with it in full; None if it can be used."""
    examples, dropped = tokenize([Record(prompt, responses, 0)], tokenizer, DataOptions())
    assert len(examples) + len(dropped) == 1
    return dropped[0].fault if dropped else None


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text, **more):
    return [{"role": "assistant", "content": text, **more}]


def test_a_chat_is_split_where_the_response_begins(chat_tokenizer):
    record = Record([{"role": "user", "content": "ab"}], ([{"role": "assistant", "content": "cd"}],), 0)
    [example], [] = tokenize([record], chat_tokenizer, DataOptions())
    assert chat_tokenizer.decode(example.prompt) == "[B]<user>ab[E]\n<assistant>"
    assert chat_tokenizer.decode(example.responses[0].ids) == "cd[E]"


def test_a_template_must_render_tools(chat_tokenizer, character_tokenizer):
    shown = "{% for t in tools or [] %}|{{ t.function.name }}|{% endfor %}"
    tokenizer = character_tokenizer(chat_template=shown + chat_tokenizer.chat_template)
    records = [Record(user("a"), (assistant("b"),), 0, TOOLS), Record(user("a"), (assistant("b"),), 1)]
    examples, dropped = tokenize(records, tokenizer, DataOptions())
    assert [tokenizer.decode(e.prompt)[:3] for e in examples] == ["|f|", "<us"] and not dropped
    examples, [dropped] = tokenize(records, chat_tokenizer, DataOptions())
    assert [example.row for example in examples] == [1]
    assert not tokenize(records[1:], chat_tokenizer, DataOptions())[1]
    needs_tools = character_tokenizer(chat_template="{% for t in tools %}|{% endfor %}" + chat_tokenizer.chat_template)
    assert not tokenize(records[:1], needs_tools, DataOptions())[1]
    assert dropped == Dropped(0, "the chat template omits tools") and "--data.tools null" in dropped.fault


def test_a_template_must_render_tool_calls(chat_tokenizer, character_tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    prompt = [*user("a"), call, {"role": "tool", "content": "3"}]
    records = [Record(prompt, (), 0), Record(user("a"), ([{**call, "content": "b"}],), 1), Record(user("a"), (), 2)]
    _, dropped = tokenize(records, chat_tokenizer, DataOptions())
    assert dropped == [Dropped(row, "the chat template omits tool_calls") for row in (0, 1)]
    shown = chat_tokenizer.chat_template.replace("{{ m.content }}", "{{ m.tool_calls }}{{ m.content }}")
    assert not tokenize(records, character_tokenizer(chat_template=shown), DataOptions())[1]


def test_a_template_that_renders_the_prompt_differently_is_refused(character_tokenizer, chat_tokenizer):
    opened = "{% if add_generation_prompt %}<assistant>"
    template = chat_tokenizer.chat_template.replace(opened, opened + "<think></think>")
    tokenizer = character_tokenizer(bos="[B]", chat_template=template)
    assert fault(tokenizer, user("ab")) is None
    message = fault(tokenizer, user("ab"), assistant("cd"))
    assert message.startswith("the chat template renders the prompt differently when a response follows (after '")
    assert "<user>ab[E]\\n<assistant>' the prompt alone has '<think></think>', and with the response 'cd[E]" in message
    assert "--data.chat_template_kwargs" in message
    assert fault(tokenizer, user("ab"), assistant("<think></think>cd")) is None


def with_content(template, code):
    """Replaces what the template renders for the content of each message."""
    assert "{{ m.content }}" in template
    return template.replace("{{ m.content }}", "{{ " + code + " }}")


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_template_must_render_every_role(role, character_tokenizer, chat_tokenizer):
    template = with_content(chat_tokenizer.chat_template, f"m.content if m.role != '{role}' else ''")
    prompt = [{"role": role, "content": "x y"}, *user("ab")]
    for responses in ((), (assistant("c"),)):
        message = fault(character_tokenizer(chat_template=template), prompt, *responses)
        assert message == (
            f"the chat template omits messages of the role '{role}'; choose one that renders them with "
            "--data.chat_template"
        )
        shown = with_content(
            chat_tokenizer.chat_template, "m.content if m.role == 'assistant' else (m.content | tojson | upper)"
        )
        assert fault(character_tokenizer(chat_template=shown), prompt, *responses) is None  # in any spelling


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_template_must_render_the_reasoning_of_the_response(key, character_tokenizer, chat_tokenizer):
    thinking = assistant("c", **{key: "why"})
    message = fault(chat_tokenizer, user("ab"), assistant("d"), thinking)
    assert message.startswith(f"the chat template omits {key};")
    assert (
        fault(chat_tokenizer, [*user("ab"), *thinking, *user("e")], assistant("d")) is None
    )  # that of earlier turns may go
    template = with_content(chat_tokenizer.chat_template, f"(m.{key} or '') + m.content")
    assert fault(character_tokenizer(chat_template=template), user("ab"), assistant("d"), thinking) is None


def test_a_template_must_render_the_whole_response(character_tokenizer, chat_tokenizer):
    strips = with_content(chat_tokenizer.chat_template, "m.content.split('</think>')[-1] | trim")
    tokenizer = character_tokenizer(chat_template=strips)
    message = fault(tokenizer, user("ab"), assistant("d"), assistant("<think>why</think>c"))
    assert message.startswith("the chat template omits all words of the response; choose one that renders them with")
    earlier = [*user("ab"), *assistant("<think>why</think>c"), *user("e")]
    assert fault(tokenizer, earlier, assistant(" d\n\n e \n")) is None  # templates may change white space
