"""The pages in a real browser: offline, by mouse and by keyboard, light and dark, wide and narrow."""

import shutil

import pytest

from qstar_jax.report.page import heatmap_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
MINUS = "\N{MINUS SIGN}"
SIZES = pytest.mark.parametrize("width", [1280, 390])


@pytest.fixture(scope="module")
def report(tmp_path_factory, whole_page):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(whole_page, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """`visit(path, width=..., scheme=...)` opens a file; at the end no page may have complained or asked for more."""
    contexts, complaints, asked, opened = [], [], [], set()

    def go(path, *, width=1280, scheme="light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, **options
        )
        context.set_default_timeout(120_000)  # milliseconds: continuous integration may be busy
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        opened.add(path.as_uri())
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == [] and set(asked) == opened


def tip_of(page) -> tuple[dict[str, str], list[list[str]]]:
    """The tooltip: its numbers by name, and the rows of its alternatives."""
    tip = page.locator("#tip")
    assert tip.is_visible()
    names, values = (tip.locator(tag).all_inner_texts() for tag in ("dt", "dd"))
    rows = [row.locator("td").all_inner_texts() for row in tip.locator("tr").all()[1:]]
    return dict(zip(names, values, strict=True)), rows


@SIZES
def test_a_hovered_token_tells_its_numbers_and_alternatives(visit, report, width, heatmaps):
    page = visit(report, width=width)
    assert page.locator("#tip").is_hidden()
    token = page.locator(".t", has_text="rooster").first
    token.hover()
    numbers, alternatives = tip_of(page)
    answer = heatmaps[0]
    at = answer.pieces.index(" rooster")
    assert numbers["token"] == "“ rooster”"
    assert numbers["log π"] == f"{answer.logp[at]:+.3f}".replace("-", MINUS)
    assert list(numbers) == ["token", "id", "log π", "log π_ref", "reward", "Q", "V", "reward so far"]
    assert alternatives[0] == ["“ three”", f"{MINUS}0.250", "+0.300"]
    assert alternatives[1][0] == '“<script>alert("x")</script>⟨U+202E⟩”' and len(alternatives) == 5
    box, place = page.locator("#tip").bounding_box(), token.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert box["y"] >= 0 and box["y"] + box["height"] <= 800
    assert box["y"] >= place["y"] + place["height"] or box["y"] + box["height"] <= place["y"]
    page.mouse.move(1, 1)
    assert page.locator("#tip").is_hidden()


def test_the_token_that_was_said_stands_out_among_the_most_likely(visit, report):
    page = visit(report)
    page.locator(".t", has_text="neighbour").first.hover()
    assert page.locator("#tip .said").all_inner_texts() == [f"“ neighbour”\t{MINUS}0.250\t+0.300"]


def test_the_keyboard_reaches_everything(visit, report):
    page = visit(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('t')"):
            break
    assert tip_of(page)[0]["token"] == "“My”"
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert tip_of(page)[0]["token"] == "“ rooster”"
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("ArrowLeft")
    assert tip_of(page)[0]["token"] == "“ a”"
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


LOOKS = """() => {
  const seen = [...document.querySelectorAll(".panel img")].filter((image) => image.checkVisibility());
  return {
    page: getComputedStyle(document.body).backgroundColor,
    token: getComputedStyle(document.querySelector(".t")).backgroundColor,
    figures: [...new Set(seen.map((image) => image.className))],
    drawn: seen.length > 0 && seen.every((image) => image.complete && image.naturalWidth > 0),
  };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_button_goes_round_the_themes_by_mouse_and_key(visit, report, scheme):
    page = visit(report, scheme=scheme)
    button = page.locator("#theme")
    looks = {}
    for press in (lambda: None, button.click, lambda: button.press("Enter"), lambda: button.press(" ")):
        press()
        looks.setdefault(button.inner_text().removeprefix("Theme: "), page.evaluate(LOOKS))
    assert list(looks) == ["auto", "light", "dark"]
    assert looks["auto"] == looks[scheme]
    assert looks["light"]["figures"] == ["light"] and looks["dark"]["figures"] == ["dark"]
    assert looks["light"]["page"] == "rgb(247, 246, 243)" and looks["dark"]["page"] == "rgb(18, 20, 24)"
    assert looks["light"]["token"] != looks["dark"]["token"]
    assert all(look["drawn"] for look in looks.values())


def test_the_theme_is_remembered(visit, report):
    page = visit(report)
    page.locator("#theme").click(click_count=2)
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.locator("#theme").inner_text() == "Theme: dark"


def test_a_browser_that_stores_nothing_still_changes_the_theme(visit, report):
    page = visit(report)
    page.context.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } })")
    page.reload()
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


OVERLAPS = """() => {
  const found = [];
  for (const section of document.querySelectorAll(".insight")) {
    const parts = [...section.querySelectorAll(":scope > h2, .statement > .status, .sides dt, .sides dd, .panel")];
    const boxes = parts.map((part) => [part.textContent.trim().slice(0, 30), part.getBoundingClientRect()]);
    for (const [i, [one, a]] of boxes.entries()) for (const [two, b] of boxes.slice(i + 1)) {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      if (across > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) found.push([one, two]);
    }
  }
  return found;
}"""
CLIPPED = """() => [...document.querySelectorAll("h1, h2, h3, h4, p, dd, dt, li, figcaption, .t")]
  .filter((part) => part.checkVisibility() && !part.classList.contains("part"))
  .filter((part) => part.getBoundingClientRect().right > innerWidth + 1)
  .map((part) => part.textContent.slice(0, 40))"""


@SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_overlaps_or_is_clipped(visit, report, width, scheme):
    page = visit(report, width=width, scheme=scheme)
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(CLIPPED) == []


@SIZES
def test_claims_stand_side_by_side_where_there_is_room(visit, report, width):
    tops = visit(report, width=width).evaluate(
        "[...document.querySelector('.sides').children].map((part) => Math.round(part.getBoundingClientRect().top))"
    )
    assert len(set(tops)) == (1 if width == 1280 else 3)


def test_without_scripts_numbers_are_in_the_titles(visit, report):
    page = visit(report, java_script_enabled=False)
    assert page.locator("#theme").is_hidden()
    title = page.locator(".t").first.get_attribute("title")
    assert "log π: " in title and "most likely here" in title


def test_the_page_of_heatmaps_alone(visit, heatmaps, tmp_path):
    path = tmp_path / "heatmap.html"
    path.write_text(heatmap_page(heatmaps, "Token rewards"), encoding="utf-8")
    page = visit(path, width=390, scheme="dark")
    page.locator(".t").nth(2).hover()
    assert tip_of(page)[0]["token"] == "“ keeps”"
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(247, 246, 243)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_steps_stand_one_below_the_other(visit, solution, tmp_path, width, scheme):
    path = tmp_path / "heatmap.html"
    path.write_text(heatmap_page([solution], "Steps"), encoding="utf-8")
    page = visit(path, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and page.evaluate(CLIPPED) == []
    tops = [box.bounding_box()["y"] for box in page.locator(".step").all()]
    assert len(tops) == 4 and tops == sorted(set(tops))
    # The arrow keys walk from step to step.
    last = page.locator(".step").first.locator(".t").last
    last.focus()
    page.keyboard.press("ArrowRight")
    assert tip_of(page)[0]["token"] == "“ 16”"
