"""Limits of chat templates: what they do is tried by `tests/malformed`."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from qstar_jax.data import template_process
from qstar_jax.data.template_process import TemplateError, check_template, render
from qstar_jax.errors import InputError

MESSAGES = [{"role": "user", "content": "hi\u202e\ud800", "name": None}]
GOOD = "{% for m in messages %}{{ m.content }}{{ 'name' in m }}{{ eos }}{% endfor %}{{ add_generation_prompt }}"


@pytest.fixture
def hasty(monkeypatch):
    """A process that gives each request a second."""
    monkeypatch.setattr(template_process, "_SECONDS", 1)
    process = template_process._Process()
    monkeypatch.setattr(template_process, "_process", process)
    yield process
    process.stop()


def test_a_template_that_loops_is_ended_and_the_next_one_renders(hasty):
    endless = "{% for a in range(99999) %}" * 3 + "{{ messages }}" + "{% endfor %}" * 3
    check_template(endless)
    with pytest.raises(InputError, match="s for one dialogue"):
        render(endless, MESSAGES, None, {})
    assert render(GOOD, MESSAGES, None, {"eos": "."}) == ("hi\u202e\ud800False.False", [])
    with pytest.raises(TemplateError, match=r"^no$"):
        render("{{ raise_exception('no') }}", MESSAGES, None, {})
    with pytest.raises(InputError, match="not valid Jinja"):
        render("{% if %}", MESSAGES, None, {})


def test_threads_get_their_own_replies():
    def rendered(i: int) -> str:
        return render(GOOD, [{"role": "user", "content": str(i)}], None, {})[0]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(rendered, range(50))) == [f"{i}FalseFalse" for i in range(50)]
