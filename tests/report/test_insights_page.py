"""The page of the three insights."""

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from qstar_jax.report.insights_page import insights_page

VOID = {"meta", "img", "br", "line", "polyline"}


class _Parsed(HTMLParser):
    """What a browser would see: tags in order, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_hostile_text_shows_as_text(whole_page):
    parsed = _Parsed(whole_page)
    assert parsed.open == []  # every tag is closed where it should be
    assert len(parsed.named("script")) == 2 and all(parsed.named("i"))  # ours have attributes
    assert "<script>alert" not in whole_page and "\u202e" not in unescape(whole_page)
    assert '<script>alert("x")</script>⟨U+202E⟩' in parsed.text and "<i>⟨U+202E⟩" in parsed.text


def test_nothing_is_loaded(whole_page):
    parsed = _Parsed(whole_page)
    policy = next(a["content"] for a in parsed.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in parsed.named("img"))
    places = {a["href"] for a in parsed.named("a")}
    assert places == {"#main", "#credit", "#search", "#decline", "#dialogue", "#steps", "#heatmaps"}
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and {place[1:] for place in places} <= set(ids)


def test_claim_number_and_paper_stand_side_by_side(whole_page, findings):
    parsed = _Parsed(whole_page)
    for finding in findings:
        title = parsed.text.rindex(finding.title)
        places = [
            parsed.text.index(getattr(finding, name)[:40], title) for name in ("claim", "measured", "paper", "command")
        ]
        assert places == sorted(places)
    statuses = [attributes["class"] for attributes in parsed.named("p") if "status" in (attributes.get("class") or "")]
    # In the contents, then in the sections.
    assert statuses == ["status yes", "status no", "status unknown", "status yes", "status yes"] * 2
    for words in ("✓reproduced", "✗not reproduced", "?cannot be told"):
        assert words in parsed.text


def test_figures_are_there_in_both_themes_with_words_and_tables(whole_page):
    parsed = _Parsed(whole_page)
    images = parsed.named("img")
    assert [image["class"] for image in images] == ["light", "dark"] * 19
    assert all(len(image["alt"]) > 40 and image["width"] and image["height"] for image in images)
    assert all(one["src"] != two["src"] for one, two in zip(images[::2], images[1::2], strict=True))
    for cell in ("0.830 [0.815, 0.845]", "20 beams", "12.5%", "0.85 ± 0.08"):
        assert cell in parsed.text
    assert len(parsed.named("table")) == 2 + 4 + 3 + 5 + 2
    assert len(whole_page.encode()) < 2e6


def test_headings_descend_one_by_one(whole_page):
    levels = [int(tag[1]) for tag, _ in _Parsed(whole_page).tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("name", ["credit", "sweep", "decline"])
def test_one_record_alone_makes_a_page(name, request):
    page = insights_page([], [request.getfixturevalue(name)], title="t")
    parsed = _Parsed(page)
    assert len(parsed.named("h2")) == 1 and parsed.named("img") and "status" not in parsed.text
    assert 'class="t' not in page and "Made by" not in parsed.text


def test_one_finding_alone_makes_a_page(findings):
    parsed = _Parsed(insights_page(findings[1:2], title="t"))
    assert [a["href"] for a in parsed.named("a")] == ["#main", "#search"]
    assert not parsed.named("img") and "Measured here" in parsed.text


def test_findings_of_one_insight_share_its_section(findings):
    parsed = _Parsed(insights_page([findings[0], replace(findings[0], title="Another model")], title="t"))
    assert len(parsed.named("h2")) == 1 and len(parsed.named("h3")) == 2 and "Another model" in parsed.text


def test_nothing_at_all_still_makes_a_page():
    assert "no results to show" in insights_page([], title="t")


def test_an_unknown_insight_is_refused(findings):
    with pytest.raises(ValueError, match="unknown insights: credits; known: credit, search, decline"):
        insights_page([replace(findings[0], insight="credits")], title="t")


def test_the_page_opens_with_the_pair_that_is_told_best_apart(findings, heatmaps):
    pair = [replace(response, row=2, reward=tuple(r / 2 for r in response.reward)) for response in heatmaps[:2]]
    page = insights_page(findings, heatmaps=[*pair, *heatmaps], title="t")
    rows = re.findall(r'aria-label="Row (\d)"', page)
    assert rows == ["0", "2", "1"]  # the widest margin first, then the others in their order
    sections = [page.index(mark) for mark in ('id="opening"', 'id="credit"', 'id="heatmaps"')]
    assert sections == sorted(sections)
    assert "lowest reward is a wrong one" in page
    unmarked = [replace(response, wrong=()) for response in heatmaps]
    assert "What the model sees in a response" in insights_page(findings, heatmaps=unmarked, title="t")
    missed = [replace(r, wrong=r.wrong and (True, *[False] * (len(r.wrong) - 1))) for r in heatmaps]
    assert "lowest reward is not a wrong one" in insights_page(findings, heatmaps=missed, title="t")
    alone = insights_page(findings, heatmaps=heatmaps[:2], title="t")
    assert 'id="opening"' in alone and 'id="heatmaps"' not in alone
