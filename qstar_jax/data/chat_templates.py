"""Chat templates: which of a tokenizer's templates makes text of dialogues, with which arguments, and on which day.

A tokenizer may have several under names. `default` renders dialogues and, as in transformers, `tool_use` those with
tools, unless `DataOptions.chat_template` chooses one for all. A template that prints today's date is told the day with
which a run began (`DataOptions.date`), at 00:00, so that the run can go on tomorrow.
"""

import copy
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from qstar_jax.config import DataOptions
from qstar_jax.console import one_line
from qstar_jax.data.columns import Messages
from qstar_jax.data.dropped import BadRow
from qstar_jax.errors import InputError

_DEFAULT, _TOOLS, _CLOCK = "default", "tool_use", "strftime_now"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of messages for what is thought before the answer


@dataclass(frozen=True)
class ChatTemplate:
    """Makes text of dialogues. `ChatTemplate.find` makes it.

    Args:
        tokenizer: The tokenizer, which knows the special tokens.
        texts: The template for dialogues without tools, and for those with tools.
        arguments: Further variables of the template.
        day: What the template takes for today; None for the real one.
    """

    tokenizer: Any
    texts: tuple[str, str]
    arguments: dict[str, Any]
    day: str | None

    @classmethod
    def find(cls, tokenizer: Any, options: DataOptions, tools: Collection[bool] = (False,)) -> "ChatTemplate":
        """Finds the template that a tokenizer and the options name, and checks that it reads what it is given.

        Args:
            tokenizer: A Hugging Face tokenizer.
            options: `chat_template`, `chat_template_kwargs` and `date` are read.
            tools: Whether dialogues have tools, for each kind of dialogue that there is.

        Raises:
            InputError: There is no such template, it is no template of chats, or an option has no effect on it.
        """
        used = {has: find_template(tokenizer, options.chat_template, tools=has) for has in tools}
        if not all("messages" in _names(text) for text in used.values()):
            which = "" if options.chat_template is None else f" {options.chat_template!r}"
            raise InputError(
                f"the chat template{which} never reads `messages`, so all prompts would be one text; expected a Jinja "
                "template such as those in chat_template.jinja of chat models"
            )
        texts = (used.get(False, ""), used.get(True, ""))
        found = cls(tokenizer, texts, options.chat_template_kwargs, options.date)
        _check_arguments(options.chat_template_kwargs, frozenset().union(*map(_variables, used.values())), tokenizer)
        if options.date is not None:
            _day(options.date)
            if not found.prints_date:
                raise InputError(
                    f"data.date {options.date} has no effect: the chat template prints no date; leave it out"
                )
        return found

    @property
    def prints_date(self) -> bool:
        """Whether the template asks which day it is."""
        return any(_CLOCK in _names(text) for text in self.texts)

    def __call__(self, messages: Messages, tools: list[dict] | None = None, *, answer_next: bool = False) -> str:
        """Renders a dialogue.

        Args:
            messages: The dialogue.
            tools: JSON schemas of the tools that it may use, if any.
            answer_next: Open the assistant's next turn (`add_generation_prompt`).

        Raises:
            BadRow: The template refuses the dialogue.
        """
        return self._render(self.texts[tools is not None], messages, tools, answer_next=answer_next)

    def lost(self, prompt: Messages, answer: Messages, tools: list[dict] | None, text: str) -> str | None:
        """Names what leaves no trace in the text of a dialogue, where a model would not see it, or not learn it.

        Thoughts and words of the assistant count in its answer only: many templates leave the thoughts of earlier turns
        out, as in a conversation.

        Args:
            prompt: The dialogue up to the answer.
            answer: The answer's message; nothing where it is to be opened (`answer_next`).
            tools: As for `__call__`.
            text: What `__call__` makes of all that.

        Returns:
            What is lost, in the plural; None if nothing is.
        """
        chosen, shown = self.texts[tools is not None], _bare(text)

        def same(messages: Messages, tools: list[dict] | None) -> bool:
            try:
                return self._render(chosen, messages, tools, answer_next=not answer) == text
            except BadRow:
                return False  # some templates cannot do without

        if tools is not None and same(prompt + answer, None):
            return "tools"
        without = {"tool_calls": _without("tool_calls", prompt + answer)}
        without |= {key: prompt + _without(key, answer) for key in _THOUGHTS}
        for key, messages in without.items():
            if messages != prompt + answer and same(messages, tools):
                return key
        for place, message in enumerate(prompt):
            other = [{**message, "content": message["content"] + "."}]
            if message["role"] == "assistant" or _bare(message["content"]) in shown:
                continue
            if same(prompt[:place] + other + prompt[place + 1 :] + answer, tools):
                return f"messages of the role {message['role']!r}"
        return None if all(_bare(message["content"]) in shown for message in answer) else "all words of the answer"

    def _render(self, text: str, messages: Messages, tools: list[dict] | None, *, answer_next: bool) -> str:
        if self.day is not None:
            text = _on(self.day, text)
        given = {"tools": tools, "add_generation_prompt": answer_next, "chat_template": text, "tokenize": False}
        try:
            return self.tokenizer.apply_chat_template(messages, **given, **self.arguments)
        except Exception as error:  # a template is a program: what it cannot do with a dialogue shows in many ways
            raise BadRow(f"the chat template refuses the messages ({one_line(str(error))})") from error


def _without(key: str, messages: Messages) -> Messages:
    return [{name: value for name, value in message.items() if name != key} for message in messages]


def _bare(text: str) -> str:
    """A text without white space, which is a template's own affair."""
    return "".join(text.split())


def named_templates(tokenizer: Any) -> dict[str, str]:
    """All chat templates of a tokenizer, by name; a single one is called `default`."""
    found = tokenizer.chat_template or {}
    return {_DEFAULT: found} if isinstance(found, str) else dict(found)


def find_template(tokenizer: Any, choice: str | None, *, tools: bool = False) -> str:
    """Finds the text of the template that renders dialogues.

    Args:
        tokenizer: A Hugging Face tokenizer.
        choice: Name of one of its templates, or path of a file that holds one; None for its own choice.
        tools: Whether the dialogues have tools.

    Raises:
        InputError: There is none, or none of that name.
    """
    named = named_templates(tokenizer)
    names = f"templates of this tokenizer: {', '.join(sorted(named)) or 'none'}"
    if choice is None:
        name = _TOOLS if tools and _TOOLS in named else _DEFAULT
        if name in named:
            return named[name]
        if named:
            raise InputError(
                f"the tokenizer has several chat templates and none is the default ({names}); choose one by "
                "--data.chat_template, or make it chat_template.jinja in the model's folder"
            )
        raise InputError(
            "the rows are chat messages (or data.as_chat is on), but the tokenizer has no chat template; use the "
            "tokenizer of an instruction-tuned model, name a file with one by --data.chat_template, or give plain text"
        )
    if choice in named:
        return named[choice]
    path = Path(choice).expanduser()
    if not path.is_file():
        raise InputError(f"data.chat_template {choice!r}: neither a template's name nor a file ({names})")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise InputError(f"data.chat_template {choice}: not a text file in UTF-8 ({error})") from error


def adopt_template(tokenizer: Any, choice: str | None) -> Any:
    """Makes the chosen template the tokenizer's default, so that it goes along with what is trained by it.

    What `default` and `tool_use` meant before is kept as `default_before` and `tool_use_before`.

    Args:
        tokenizer: A Hugging Face tokenizer.
        choice: As for `find_template`; None changes nothing.

    Returns:
        The tokenizer, or a copy of it with other templates.

    Raises:
        InputError: There is no such template.
    """
    if choice is None:
        return tokenizer
    text, named = find_template(tokenizer, choice), named_templates(tokenizer)
    adopted = copy.copy(tokenizer)
    if len(named) < 2:
        adopted.chat_template = text
        return adopted
    before = {f"{name}_before": named[name] for name in (_DEFAULT, _TOOLS) if named.get(name, text) != text}
    kept = {name: other for name, other in named.items() if f"{name}_before" not in before}
    adopted.chat_template = kept | before | {_DEFAULT: text}
    return adopted


def check_without_chats(options: DataOptions) -> None:
    """Refuses options about chat templates where no row is a chat.

    Raises:
        InputError: One of them is set.
    """
    given = [name for name in ("chat_template", "chat_template_kwargs", "date") if getattr(options, name)]
    if given:
        raise InputError(
            f"data.{given[0]} has no effect: no row is a chat; set --data.as_chat to make chats of plain text, or "
            "leave it out"
        )


def _check_arguments(arguments: dict[str, Any], read: Collection[str], tokenizer: Any) -> None:
    reserved = {"messages", _CLOCK, *inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents"}
    for name, value in arguments.items():
        if name in reserved:
            raise InputError(f"data.chat_template_kwargs: {name!r} is set by the program itself; leave it out")
        if name not in read:
            known = ", ".join(sorted(set(read) - reserved)) or "nothing"
            raise InputError(f"data.chat_template_kwargs: the chat template does not read {name!r}; it reads {known}")
        if not _is_plain(value):
            raise InputError(
                f"data.chat_template_kwargs: {name!r} is {type(value).__name__}; expected text, numbers, booleans, "
                "lists and dictionaries"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    return (
        all(map(_is_plain, value)) if isinstance(value, list) else value is None or isinstance(value, str | int | float)
    )


def _day(text: str) -> datetime:
    try:
        return datetime.combine(date.fromisoformat(text), datetime.min.time())
    except ValueError as error:
        raise InputError(f"data.date {text!r}: expected a date such as 2026-01-31") from error


def _on(day: str, text: str) -> str:
    """The template for a day; its clock stands still.

    The clock is no argument that could be given: transformers lets only plain data through. So it is set where
    transformers keeps what it has compiled, under a text of its own: the comment's line leaves no trace in the output.
    """
    from transformers.utils import chat_template_utils

    text = f"{{# today is {day} #}}\n{text}"
    chat_template_utils._compile_jinja_template(text).globals[_CLOCK] = _day(day).strftime
    return text


@lru_cache
def _parsed(text: str) -> Any:
    import jinja2
    from transformers.utils import chat_template_utils

    try:
        return chat_template_utils._compile_jinja_template(text).environment.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid Jinja (line {error.lineno}: {error.message})") from error


def _names(text: str) -> set[str]:
    import jinja2

    return {node.name for node in _parsed(text).find_all(jinja2.nodes.Name)}


def _variables(text: str) -> set[str]:
    """What a template looks up in what it is given."""
    import jinja2.meta

    return jinja2.meta.find_undeclared_variables(_parsed(text))
