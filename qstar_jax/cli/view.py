"""`qstar view`: a page on the loopback interface that scores what is typed."""

import socket
from threading import Lock
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qstar_jax.api import Model, load
from qstar_jax.config import ViewConfig
from qstar_jax.console import one_line, say
from qstar_jax.errors import InputError
from qstar_jax.report.numbers import signed
from qstar_jax.report.page import heatmap_view
from qstar_jax.report.rendering import render

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

_HOST = "127.0.0.1"
_LONGEST = 100_000  # characters of what is typed


def run(config: ViewConfig):
    """Serves the page until it is interrupted."""
    try:
        import uvicorn
    except ImportError as error:
        raise InputError("it needs a web server: pip install 'qstar_jax[view]'") from error
    console = Console()
    say(console, f"loading {config.model}")
    model = load(config.model, reference=config.reference, beta=config.beta, compute=config.compute, mesh=config.mesh)
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((_HOST, config.port))
    except OSError as error:
        raise InputError(
            f"--port {config.port}: {error.strerror}; choose another, or 0 for any that is free"
        ) from error
    say(console, f"{config.model}: http://{_HOST}:{server.getsockname()[1]} (Ctrl-C ends)")
    uvicorn.Server(uvicorn.Config(make_app(model, config), log_level="warning")).run(sockets=[server])


def make_app(model: Model, config: ViewConfig) -> "Starlette":
    """Makes the web application: one page with a form, which shows what was scored or searched for.

    It answers requests to this machine's names only, so that pages of others cannot reach it through a name of theirs.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    one_at_a_time = Lock()  # the model is one, and requests come in threads

    async def show(request: "Request") -> HTMLResponse:
        from starlette.concurrency import run_in_threadpool

        form = dict(await request.form(max_part_size=4 * _LONGEST)) if request.method == "POST" else {}
        page, status = await run_in_threadpool(answer, form)
        return HTMLResponse(page, status)

    def answer(form: dict[str, Any]) -> tuple[str, int]:
        with one_at_a_time:
            return _page(model, config, form)

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])
    return Starlette(routes=[Route("/", show, methods=["GET", "POST"])], middleware=[hosts])


def _page(model: Model, config: ViewConfig, form: dict[str, Any]) -> tuple[str, int]:
    """The page after a form was sent, and its HTTP status."""
    typed = {name: str(form.get(name, "")).replace("\r\n", "\n")[:_LONGEST] for name in ("prompt", "response")}
    as_chat = "as_chat" in form if form else model.tokenizer.chat_template is not None
    heat, answers, error = None, [], None
    try:
        if "beams" in form:
            options = {"beams": config.beams, "return_sequences": config.beams, "max_new_tokens": config.max_new_tokens}
            [answers] = model.generate(typed["prompt"], **options, as_chat=as_chat)
            answers = [best for best in answers if best.finish != "none"]
        elif form:
            scores = model.score(typed["prompt"], typed["response"], as_chat=as_chat, alternatives=config.alternatives)
            heat = heatmap_view(scores.responses)
    except InputError as problem:
        error = str(problem)
    page = render(
        "view.html.j2",
        title=one_line(config.model),
        notes=(),
        typed=typed,
        as_chat=as_chat,
        has_template=model.tokenizer.chat_template is not None,
        beams=config.beams,
        heat=heat,
        answers=[{"text": best.text, "logp": signed(best.logp, 2)} for best in answers],
        error=error,
    )
    return page, 400 if error else 200
