"""Renders dialogues with the chat template of a tokenizer.

A tokenizer may have several named templates. As in transformers, `default` renders dialogues and `tool_use` those with
tools, unless `DataOptions.chat_template` selects one for all. A template that prints today's date gets the date on
which the run began (`DataOptions.date`), at 00:00, so that a run continued later renders the same prompts.
"""

import copy
import inspect
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from qstar_jax.config import DataOptions
from qstar_jax.data.columns import Messages
from qstar_jax.data.dropped import BadRow
from qstar_jax.data.template_process import check_template, render
from qstar_jax.data.tool_calls import with_either_arguments
from qstar_jax.errors import InputError
from qstar_jax.untrusted import read_text

_DEFAULT, _TOOLS, _CLOCK = "default", "tool_use", "strftime_now"
_MAX_TEMPLATE = 2**20  # bytes; the longest templates of chat models have a twentieth of it
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_INSIDE = re.compile(r"__\w+__")  # the sandbox would give nothing for it, or refuse each dialogue
_FIX = "choose another with --data.chat_template FILE"
_REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of messages that hold reasoning


@dataclass(frozen=True)
class ChatTemplate:
    """Renders dialogues as text; made by `ChatTemplate.find`.

    Attributes:
        tokenizer: The tokenizer, which has the special tokens.
        texts: Source of the template for dialogues without tools, and for those with tools.
        arguments: Additional variables of the template.
        date: Date that the template prints; None: the current date.
    """

    tokenizer: Any
    texts: tuple[str, str]
    arguments: dict[str, Any]
    date: str | None

    @classmethod
    def find(cls, tokenizer: Any, options: DataOptions, tools: Collection[bool] = (False,)) -> "ChatTemplate":
        """Finds the template selected by a tokenizer and the options, and checks that it uses its inputs.

        Args:
            tokenizer: A Hugging Face tokenizer.
            options: Reads `chat_template`, `chat_template_kwargs` and `date`.
            tools: Kinds of dialogues in the data: True for those with tools, False for those without.

        Raises:
            InputError: There is no such template, it does not render messages, or an option has no effect on it.
        """
        # Find a template for each kind of dialogue; each must read the messages.
        texts = {has_tools: find_template(tokenizer, options.chat_template, tools=has_tools) for has_tools in tools}
        if not all("messages" in _names(text) for text in texts.values()):
            which = "" if options.chat_template is None else f" {options.chat_template!r}"
            raise InputError(
                f"the chat template{which} never reads `messages`, so all prompts would be equal; expected a Jinja "
                "template like the chat_template.jinja of chat models"
            )
        # Refuse arguments that none of them reads, and a date that none prints.
        variables = frozenset().union(*map(_variables, texts.values()))
        _check_arguments(options.chat_template_kwargs, variables, tokenizer)
        both = (texts.get(False, ""), texts.get(True, ""))
        template = cls(tokenizer, both, options.chat_template_kwargs, options.date)
        if options.date is not None:
            _check_date(options.date)
            if not template.prints_date:
                raise InputError(
                    f"data.date {options.date} has no effect: the chat template prints no date; remove the option"
                )
        return template

    @property
    def prints_date(self) -> bool:
        """Whether the template prints the current date."""
        return any(_CLOCK in _names(text) for text in self.texts)

    def with_variables(self, variables: dict[str, Any] | None) -> "ChatTemplate":
        """Returns the template with the variables of a row, which come before those of the options.

        Raises:
            BadRow: The template does not read one of them.
        """
        if not variables:
            return self
        try:
            _check_arguments(variables, frozenset().union(*map(_variables, filter(None, self.texts))), self.tokenizer)
        except InputError as error:
            raise BadRow("the chat template does not read the variables of the row", f" ({error})") from error
        return replace(self, arguments=self.arguments | variables)

    def __call__(self, messages: Messages, tools: list[dict] | None = None, *, open_turn: bool = False) -> str:
        """Renders a dialogue.

        Args:
            messages: The dialogue.
            tools: JSON schemas of the available tools, if any.
            open_turn: Append the header of the assistant's next turn (`add_generation_prompt`).

        Raises:
            BadRow: The template refuses the dialogue.
        """
        return self._render(self.texts[tools is not None], messages, tools, open_turn=open_turn)

    def generation_spans(
        self, messages: Messages, tools: list[dict] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Renders a dialogue, and finds what the template marks as the assistant's with `{% generation %}`.

        Returns:
            The text, and start and end of each span in characters; none if the template marks nothing.
        """
        text = self.texts[tools is not None]
        if not _GENERATION.search(text):
            return "", []
        return with_either_arguments(messages, lambda form: self._rendered(text, form, tools, spans=True))

    def omitted(self, prompt: Messages, response: Messages, tools: list[dict] | None, text: str) -> str | None:
        """Finds a part of a dialogue that its rendered text does not depend on, which a model would never see.

        Reasoning and words of the assistant are checked in the response only: many templates omit the reasoning of
        earlier turns on purpose.

        Args:
            prompt: The dialogue before the response.
            response: The messages of the response; empty if its turn is to be opened (`open_turn`).
            tools: As for `__call__`.
            text: The dialogue as rendered by `__call__`.

        Returns:
            What is omitted, in the plural; None if nothing is.
        """
        template, rendered = self.texts[tools is not None], _strip_spaces(text)

        def unchanged(messages: Messages, tools: list[dict] | None) -> bool:
            try:
                return self._render(template, messages, tools, open_turn=not response) == text
            except BadRow:
                return False  # some templates require what was removed

        # Remove the tools, and tool calls and reasoning of each message: the text must change.
        if tools is not None and unchanged(prompt + response, None):
            return "tools"
        messages = prompt + response
        for index, message in enumerate(messages):
            for key in ("tool_calls", *(_REASONING if index >= len(prompt) else ())):
                if key in message and unchanged(_without(key, messages, index), tools):
                    return key
        # Edit each message of others that does not appear verbatim: the text must change.
        for index, message in enumerate(messages):
            if message["role"] == "assistant" or _strip_spaces(message["content"]) in rendered:
                continue
            edited = [{**message, "content": message["content"] + "."}]
            if unchanged(messages[:index] + edited + messages[index + 1 :], tools):
                return f"messages of the role {message['role']!r}"
        # The assistant's words must appear verbatim.
        words = [message["content"] for message in response if message["role"] == "assistant"]
        verbatim = all(_strip_spaces(word) in rendered for word in words)
        return None if verbatim else "all words of the response"

    def _render(self, text: str, messages: Messages, tools: list[dict] | None, *, open_turn: bool) -> str:
        return with_either_arguments(messages, lambda form: self._rendered(text, form, tools, open_turn=open_turn)[0])

    def _rendered(self, text: str, messages: Messages, tools: list[dict] | None, **options: bool):
        variables = {**self.tokenizer.special_tokens_map, **self.arguments}
        return render(text, messages, tools, variables, day=self.date, **options)


def _without(key: str, messages: Messages, index: int) -> Messages:
    shorter = {name: value for name, value in messages[index].items() if name != key}
    return [*messages[:index], shorter, *messages[index + 1 :]]


def _strip_spaces(text: str) -> str:
    """Removes all white space, which templates are free to change."""
    return "".join(text.split())


def _named_templates(tokenizer: Any) -> dict[str, str]:
    """Returns all chat templates of a tokenizer by name; a single one is called `default`."""
    templates = tokenizer.chat_template or {}
    return dict(templates) if isinstance(templates, dict) else {_DEFAULT: templates}


def find_template(tokenizer: Any, choice: str | None, *, tools: bool = False) -> str:
    """Finds the text of the template that renders dialogues.

    Args:
        tokenizer: A Hugging Face tokenizer.
        choice: Name of one of its templates, or path of a file that holds one; None: the tokenizer's default.
        tools: Whether the dialogues have tools.

    Raises:
        InputError: There is none, or none of that name.
    """
    templates = _named_templates(tokenizer)
    for name, text in templates.items():
        if not isinstance(text, str) or len(text) > _MAX_TEMPLATE:
            found = f"{len(text):,} characters" if isinstance(text, str) else type(text).__name__
            raise InputError(
                f"the tokenizer's chat template {name!r} is no text of at most {_MAX_TEMPLATE:,} characters (found: "
                f"{found}); choose another with --data.chat_template FILE, or repair it in the model's folder"
            )
    names = f"templates of this tokenizer: {', '.join(sorted(templates)) or 'none'}"
    if choice is None:
        name = _TOOLS if tools and _TOOLS in templates else _DEFAULT
        if name in templates:
            return templates[name]
        if templates:
            raise InputError(
                f"the tokenizer has several chat templates but no default ({names}); choose one with "
                "--data.chat_template, or save it as chat_template.jinja in the model's folder"
            )
        raise InputError(
            "the rows are chat messages (or data.as_chat is on), but the tokenizer has no chat template; use the "
            "tokenizer of an instruction-tuned model, name a template file with --data.chat_template, or use plain text"
        )
    if choice in templates:
        return templates[choice]
    path = Path(choice).expanduser()
    if not path.is_file():
        raise InputError(f"data.chat_template {choice!r}: neither the name of a template nor a file ({names})")
    try:
        return read_text(path, _MAX_TEMPLATE)
    except InputError as error:
        raise InputError(f"data.chat_template {error}") from error


def adopt_template(tokenizer: Any, choice: str | None) -> Any:
    """Makes the chosen template, if any, the tokenizer's default, so that it is saved with the trained model.

    Previous templates named `default` and `tool_use` are kept as `default_before` and `tool_use_before`.

    Returns:
        The tokenizer, or a copy of it with other templates.

    Raises:
        InputError: There is no such template.
    """
    if choice is None:
        return tokenizer
    text, templates = find_template(tokenizer, choice), _named_templates(tokenizer)
    adopted = copy.copy(tokenizer)
    if len(templates) < 2:
        adopted.chat_template = text
        return adopted
    # Rename the templates that would otherwise be used instead of the chosen one, and keep all others.
    renamed = {f"{name}_before": templates[name] for name in (_DEFAULT, _TOOLS) if templates.get(name, text) != text}
    kept = {name: other for name, other in templates.items() if f"{name}_before" not in renamed}
    adopted.chat_template = kept | renamed | {_DEFAULT: text}
    return adopted


def check_without_chats(options: DataOptions) -> None:
    """Refuses options of chats if no row is a chat.

    Raises:
        InputError: One of them is set.
    """
    names = ("chat_template", "chat_template_kwargs", "date", "turns")
    unused = [name for name in names if getattr(options, name) != getattr(DataOptions(), name)]
    if unused:
        raise InputError(
            f"data.{unused[0]} has no effect: no row is a chat; set --data.as_chat to turn plain text into chats, or "
            "remove the option"
        )


def _check_arguments(arguments: dict[str, Any], variables: Collection[str], tokenizer: Any) -> None:
    reserved = {"messages", _CLOCK, *inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents"}
    for name, value in arguments.items():
        if name in reserved:
            raise InputError(f"data.chat_template_kwargs: {name!r} is set by the program; remove it")
        if name not in variables:
            readable = ", ".join(sorted(set(variables) - reserved)) or "nothing"
            raise InputError(
                f"data.chat_template_kwargs: the chat template does not read {name!r}; it reads {readable}"
            )
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


def _check_date(text: str):
    try:
        date.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"data.date {text!r}: expected a date such as 2026-01-31") from error


@lru_cache
def _parsed(text: str) -> Any:
    import jinja2
    from transformers.utils import chat_template_utils

    # Parsed here and compiled there: the compiler computes what is constant, such as 10**10**10.
    try:
        parsed = chat_template_utils._compile_jinja_template("").environment.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid Jinja (line {error.lineno}: {error.message})") from error
    except RecursionError as error:
        raise InputError("the chat template is nested too deeply; expected one like those of chat models") from error
    names = [node.attr for node in parsed.find_all(jinja2.nodes.Getattr)]
    names += [node.value for node in parsed.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    if inside := next(filter(_INSIDE.fullmatch, names), None):
        raise InputError(f"the chat template reaches for {inside!r}, which is Python's; {_FIX}")
    check_template(text)
    return parsed


def _names(text: str) -> set[str]:
    import jinja2

    return {node.name for node in _parsed(text).find_all(jinja2.nodes.Name)}


@lru_cache
def _variables(text: str) -> set[str]:
    """Returns the variables that a template reads from its arguments."""
    import jinja2.meta

    return jinja2.meta.find_undeclared_variables(_parsed(text))
