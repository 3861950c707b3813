import pytest

from qstar_jax.errors import InputError
from qstar_jax.pipeline import Template


def test_earlier_texts_are_filled_in_and_not_read_as_templates():
    template = Template('{{"task": {prompt}}}\n{outline}{outline}')
    assert template.names == ("prompt", "outline", "outline")
    assert template.fill({"prompt": "{outline} {0}", "outline": "a}"}) == '{"task": {outline} {0}}\na}a}'
    template.check(("prompt", "outline"), "stages[1].template")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{draft}", r"\{draft\} is no text that comes before; expected \{prompt\}, \{outline\}"),
        ("{prompt!r}", "without a format"),
        ("{prompt:>8}", "without a format"),
        ("{}", "is no text"),
        ("{prompt.text}", "is no text"),
        ("{prompt", "write {{ and }} for braces"),
        ("Write something.", r"reads none of the texts before it; put in \{prompt\}, \{outline\}"),
    ],
)
def test_templates_that_cannot_be_filled_in_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Template(text).check(("prompt", "outline"), "stages[1].template")
