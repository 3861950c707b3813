"""Answers as a page."""

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

from qstar_jax.report.numbers import signed
from qstar_jax.report.page import heatmap_page

MINUS = "\N{MINUS SIGN}"
HOSTILE = ["<script>alert(1)</script>", "{{ 7*7 }}", "{% raw %}", "\"'", "\u202e", "</span>", "&lt;"]


class _Tokens(HTMLParser):
    """Collects what a browser would see: the tags, and each token's text and title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "t" in (attributes.get("class") or "").split():
            self.tokens.append(("", attributes["title"]))
            self._inside = True

    def handle_data(self, data):
        if self._inside:
            text, title = self.tokens[-1]
            self.tokens[-1] = (text + data, title)

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "span"


def test_hostile_text_shows_as_text(respond):
    page = heatmap_page([respond(HOSTILE, [0.1] * 7, prompt=HOSTILE[0], role="<b>")], title=HOSTILE[0])
    parsed = _Tokens(page)
    assert [text for text, _ in parsed.tokens] == [*HOSTILE[:4], "⟨U+202E⟩", *HOSTILE[5:]]
    assert [tag for tag, _ in parsed.tags].count("script") == 2  # our own: the theme, the tooltips
    assert "<script>alert" not in page and "\u202e" not in page and "<b></span>" not in page
    assert "{{ 7*7 }}" in page


def test_words_that_the_data_mark_as_wrong_are_framed_and_told(respond):
    right = respond([" a", " b"], [0.2, -0.1])
    found = replace(respond([" a", " b", " c"], [0.1, -2.0, 0.3], row=1), wrong=(False, True, True))
    missed = replace(respond([" d", " e"], [0.1, -0.2], row=2), wrong=(True, False))
    page = heatmap_page([right, found, missed], "t")
    framed = re.findall(r'class="t[^"]* wrong[^"]*".*?>([^<]*)</span>', page, re.DOTALL)
    assert framed == [" b", " c", " d"] and page.count("in the data: marked as wrong") == 3
    assert "The lowest reward is that of “b”, which is wrong." in page
    assert "The lowest reward is that of “e”, which is not among the wrong words." in page
    assert "1 of 2 responses with such words" in page
    assert "Framed" not in heatmap_page([right], "t")


def test_nothing_is_loaded(respond):
    parsed = _Tokens(heatmap_page([respond(["http://example.org/x.png"], [0.5])], "t"))
    loads = {"src", "href", "srcset", "poster", "action", "data", "xlink:href"}
    places = [attributes[name] for _, attributes in parsed.tags for name in loads & set(attributes)]
    assert places == ["#main"]  # the link that skips to the content
    page = heatmap_page([respond(["a"], [0.5])], "t")
    assert not re.search(r"url\(|@import|https?://|fetch\(|\bimport\b", page)
    policy = [tag for tag in parsed.tags if tag[1].get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy[0][1]["content"]


def test_every_token_tells_its_numbers(respond):
    response = respond(["One", " two", "\n"], [0.125, -1.3, 0.0421])
    titles = [title.replace(MINUS, "-") for _, title in _Tokens(heatmap_page([response], "t")).tokens]
    assert titles[1].split("\n") == [
        "token: “ two”",
        "id: 101",
        "log π: -14.120",
        "log π_ref: -1.120",
        "reward: -1.300",
        "Q: +0.838",
        "V: +2.250",
        "reward so far: -1.175",
    ]
    assert ["reward: +0.125" in titles[0], "reward: +0.042" in titles[2], "“↵”" in titles[2]] == [True] * 3


def test_alternatives_are_rows_of_a_table_without_markup(heatmaps):
    titles = [title for _, title in _Tokens(heatmap_page(heatmaps, "t")).tokens]
    heading, *rows = titles[0].split("\n")[8:]
    assert heading.split("\t") == ["most likely here", "log π", "reward"]
    assert [row.split("\t") for row in rows[:3]] == [
        ["“ three”", f"{MINUS}0.250", "+0.300"],
        ['“<script>alert("x")</script>⟨U+202E⟩”', f"{MINUS}0.950", "+0.150"],
        ["“↵”", f"{MINUS}1.650", "+0.000"],
    ]
    assert rows[4].split("\t")[0] == "“⇥”"


def test_whitespace_and_newlines_are_kept(respond):
    tokens = _Tokens(heatmap_page([respond(["if x:", "\n\n    ", "y", ""], [0.0] * 4)], "t")).tokens
    assert [text for text, _ in tokens] == ["if x:", "↵\n↵\n    ", "y", ""]
    assert tokens[3][1].startswith("token: (part of the next character)")


def test_colours_follow_the_rewards(respond):
    page = heatmap_page([respond(["bad", "so", "good"], [-2.0, 0.0, 2.0])], "t")
    styles = [attributes["style"] for _, attributes in _Tokens(page).tags if attributes.get("title")]
    assert styles == ["--l:#dd6a56;--d:#b9473a", "--l:#ffffff;--d:#1b1e24", "--l:#4d9acb;--d:#2b74ae"]
    assert page.count('class="t low"') == 1
    assert "≥ +2.00" in page and f"≤ {MINUS}2.00" in page


@pytest.mark.parametrize(
    ("chosen", "rejected", "words", "marked"),
    [
        (1.0, -1.0, "The model prefers the <b>chosen</b> response", 1),
        (-900.0, 900.0, "The model prefers the <b>rejected</b> response", 1),
        (0.5, 0.5, "The model prefers <b>neither</b> response", 0),
    ],
)
def test_verdict(respond, chosen, rejected, words, marked):
    pair = [respond(["a"], [chosen], role="chosen"), respond(["b"], [rejected], role="rejected", truncated=True)]
    page = heatmap_page(pair, "t")
    assert words in page and page.count('class="response preferred"') == marked
    assert f"in {int(chosen > rejected)} of 1 pair." in page
    assert page.count(">truncated</span>") == 1 and "makes this approximate" in page


def test_probability_is_the_sigmoid_of_the_margin(respond):
    page = heatmap_page([respond(["a"], [1.5], role="chosen"), respond(["b"], [0.5], role="rejected")], "t")
    page = " ".join(page.split())
    assert "margin +1.000, probability that chosen beats rejected 0.731" in page


def test_the_running_sum_is_drawn_for_each_response(respond):
    page = heatmap_page([respond(["a", "b"], [1.0, -0.5]), respond(["c", "d"], [0.0, 0.5])], "t")
    assert re.findall(r'<polyline points="([^"]*)"', page) == ["0,100 500,0 1000,50", "0,100 500,100 1000,50"]


def test_no_responses_and_not_a_number_still_make_a_page(respond):
    assert "no responses to show" in heatmap_page([], "t")
    page = heatmap_page([respond(["a", "b"], [float("nan"), 1.0])], "t")
    assert "reward: +nan" in unescape(page) and 'style="--l:#ffffff' in page


def test_code_is_set_in_letters_of_equal_width(respond):
    assert "tokens code" in heatmap_page([respond(["if x:", "\n    ", "y"], [0.0] * 3)], "t")
    assert "tokens code" not in heatmap_page([respond(["Plain words.\n", "More."], [0.0] * 2)], "t")


def test_signed_uses_a_real_minus():
    assert (signed(-1.3), signed(0.0421), signed(2.0, 1)) == (MINUS + "1.300", "+0.042", "+2.0")


def test_each_turn_of_a_dialogue_has_a_row(dialogue, respond):
    page = heatmap_page([dialogue, respond(["One", " turn"], [0.5, 0.5])], "t")
    [table] = re.findall(r'<table class="turns">.*?</table>', page, re.DOTALL)  # a single turn has none
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert [rows[0], rows[1][:3], rows[1][4]] == [
        ["turn", "text", "tokens", "reward", "value after"],
        ["0", "Red?&lt;eos&gt;", "2"],
        "+0.750",
    ]
    assert rows[2][:3] + rows[2][4:] == ["1", "Red{{ 7*7 }}&lt;b&gt;&lt;eos&gt;", "3", f"{MINUS}0.375"]
    assert re.findall(r">([^<>]+)</span>", table) == ["+0.750", f"{MINUS}1.125"]
    # The larger sum has the full colour, on the turns' own scale.
    assert re.findall(r'style="([^"]*)"', table)[1] == "--l:#dd6a56;--d:#b9473a"


def test_the_environment_is_dim_and_tells_no_numbers(dialogue, respond):
    page = heatmap_page([dialogue], "t")
    parsed = _Tokens(page)
    tokens = [attributes for _, attributes in parsed.tags if attributes.get("title")]
    assert ["dim" in token["class"].split() for token in tokens] == [False, False, True, False, False, False]
    assert tokens[2]["style"] == "" and "reward" not in tokens[2]["title"] and "no action" in tokens[2]["title"]
    assert "turn: 1" in tokens[3]["title"].split("\n")
    note = "Grey tokens without a colour"
    assert note in page and note not in heatmap_page([respond(["a"], [0.5])], "t")


def test_steps_are_lines_with_their_rewards(solution):
    page = heatmap_page([solution], "t")
    parsed = _Tokens(page)
    assert "".join(text for text, _ in parsed.tokens).replace("↵", "") == "".join(solution.pieces).replace(
        "\u202e", "⟨U+202E⟩"
    )
    lines = re.findall(r'<div class="step.*?(?=<div class="step|<p class="quiet note">)', page, re.DOTALL)
    assert ["first suspected error" in line for line in lines] == [False, False, True, False]
    for line, step in zip(lines, solution.steps, strict=True):
        assert signed(step.reward) in line and signed(step.value) in line
    assert f"sum {signed(solution.total_reward)} (the outcome reward), min {signed(solution.step_totals.min)}" in page
    assert "endogenous reward: +0.020" in parsed.tokens[0][1] and "entropy of π_ref: +0.500" in parsed.tokens[0][1]
    assert "endogenous" not in parsed.tokens[-1][1]  # not known where a response was truncated
    assert 'role="list"' not in heatmap_page([replace(solution, step=())], "t")
