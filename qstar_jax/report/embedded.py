"""Views inside another page, such as a notebook: a page in a frame, and tables without a style sheet of their own."""

from collections.abc import Sequence

from markupsafe import Markup, escape

from qstar_jax.decoding.decoder import Generation
from qstar_jax.report.numbers import signed
from qstar_jax.report.rendering import render

_FRAME = Markup(
    '<iframe srcdoc="{page}" title="{title}" sandbox="allow-scripts" loading="lazy" '
    'style="width:100%;height:{height}px;border:0;resize:vertical"></iframe>'
)


def framed(page: str, title: str = "Token rewards", height: int = 560) -> str:
    """Puts a whole page into a frame, apart from the page around it: its styles and scripts reach nothing else.

    Args:
        page: A whole HTML document.
        title: What screen readers call the frame.
        height: In pixels; the reader may drag its lower edge.
    """
    return _FRAME.format(page=escape(page), title=title, height=height)


def answers_table(prompts: Sequence[str], generations: Sequence[Sequence[Generation]]) -> str:
    """Draws prompts and the responses to each as a table; every text is escaped."""
    rows = [
        {"prompt": prompt, "answers": [_answer(generation) for generation in several]}
        for prompt, several in zip(prompts, generations, strict=True)
    ]
    has_reward = any(generation.reward is not None for several in generations for generation in several)
    return render("_answers.html.j2", rows=rows, has_reward=has_reward)


def _answer(generation: Generation) -> dict[str, str | int]:
    end = "" if generation.finished or generation.finish == "none" else " …"
    return {
        "text": generation.text + end,
        "finish": "no response was found" if generation.finish == "none" else generation.finish,
        "length": generation.length,
        "logp": "" if generation.logp is None else signed(generation.logp, 2),
        "reward": "" if generation.reward is None else signed(generation.reward, 2),
        "certified": "proven best" if generation.certified else "",
    }
