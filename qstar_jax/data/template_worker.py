"""The program of the process that compiles and renders chat templates for `template_process`, within limits.

A template is a program, and the sandbox of Jinja keeps it from files and from Python's insides, not from endless loops
or texts that fill the memory. This process has a limit on memory, and a clock that ends it during a rendering which
takes too long. Each line of its input is a request in JSON, and each line of its output a reply. It imports nothing of
the package.
"""

import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateSyntaxError
from transformers.utils import chat_template_utils

_MAX_OUTPUT = 2**24  # characters, four times as many as a row may have


def main(seconds: int, memory: int):
    """Answers requests until the input ends.

    Args:
        seconds: Processor time for each request, after which the system ends the process.
        memory: Bytes of data that the process may have.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write among the replies
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    texts: dict[int, str] = {}
    for line in sys.stdin:
        request = json.loads(line)
        texts |= {request["template"]: request["text"]} if "text" in request else {}
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = json.dumps(_answer(texts[request["template"]], request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply + "\n")
        replies.flush()


def _answer(text: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if request["day"] is not None:
            text = _with_date(request["day"], text)
        chat_template_utils._compile_jinja_template(text)
        if request["messages"] is None:
            return {}
        [rendered], spans = chat_template_utils.render_jinja_template(
            [request["messages"]],
            tools=request["tools"],
            chat_template=text,
            return_assistant_tokens_mask=request["spans"],
            add_generation_prompt=request["open_turn"],
            **request["variables"],
        )
    except TemplateSyntaxError as error:
        return {"invalid": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"exceeds": "memory"}
    except Exception as error:  # a template can fail in many ways
        return {"refusal": str(error) or type(error).__name__}
    if len(rendered) > _MAX_OUTPUT:
        return {"exceeds": "output"}
    return {"text": rendered, "spans": spans[0] if request["spans"] else []}


def _with_date(day: str, text: str) -> str:
    """Returns a template whose clock is fixed to a date.

    The clock is a function, which transformers does not accept as an argument, so it is set in transformers' cache of
    compiled templates. A comment line, which does not change the output, gives the template its own cache entry.
    """
    text = f"{{# today is {day} #}}\n{text}"
    template = chat_template_utils._compile_jinja_template(text)
    template.globals["strftime_now"] = datetime.fromisoformat(day).strftime
    return text


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
