"""Two writers: whose fault it is, on posts and texts written by hand, and how often each errs."""

from random import Random

import numpy as np
import pytest

from qstar_jax.tasks.tiny_tldr import read_post
from qstar_jax.tasks.tiny_tldr.outlines import FAULTY, draw_outline, draw_text, faults, outline_rows, prompts
from qstar_jax.tasks.tiny_tldr.posts import make_post
from qstar_jax.tasks.tiny_tldr.rewards import stated_facts

POST = read_post(
    "Hello! Julia Moss bought a yellow lamp. It was on October 12. The price was 185 dollars, not 235. "
    "It was at Old Mill."
)
RIGHT = " Julia Moss; bought a yellow lamp; 185."


@pytest.mark.parametrize(
    ("outline", "text", "expected"),
    [
        (RIGHT, " Julia Moss bought a yellow lamp for just 185 dollars.", (False, False)),
        (" Julia Moss; bought a yellow lamp; 235.", " Julia Moss bought a yellow lamp for 235 dollars.", (True, False)),
        (RIGHT, " Julia Moss bought a yellow lamp for 235 dollars.", (False, True)),
        (" Julia Moss; bought a yellow lamp; 235.", " Julia Moss bought a yellow lamp for 185 dollars.", (True, True)),
        (RIGHT, " At Old Mill, Julia Moss bought a yellow lamp.", (False, True)),  # not on the list
        (RIGHT, " Julia Moss bought a yellow lamp. It is a long story.", (False, True)),
    ],
)
def test_faults_by_hand(outline, text, expected):
    assert faults(POST, outline, text) == expected


def test_lists_are_read_as_they_were_written():
    assert stated_facts(RIGHT) == {"who": "Julia Moss", "what": "bought a yellow lamp", "much": "185"}


def test_each_writer_errs_as_often_as_it_should():
    rng, found = Random(0), []
    for _ in range(2000):
        post = make_post(rng)
        outline = draw_outline(post, rng)
        found.append(faults(post, outline, draw_text(outline, rng)))
    np.testing.assert_allclose(np.mean(found, 0), FAULTY, atol=5 * np.sqrt(0.25 / 2000))


def test_rows_are_posts_of_the_task():
    assert all(
        read_post(prompt) for prompt in [*prompts(3, seed=0), *(row["prompt"] for row in outline_rows(3, seed=0))]
    )
