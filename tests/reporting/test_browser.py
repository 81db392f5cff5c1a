"""The page in a browser: Chromium, headless, offline. Skipped by name where there is none."""

import json
import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture
def page_file(written) -> Path:
    return written.page


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, page_file, request):
    """The page, with what its console said and what it asked for. `request.param`: settings of the context."""
    context = browser.new_context(**getattr(request, "param", {}))
    page = context.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda problem: page.said.append(str(problem)))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(page_file.as_uri())
    yield page
    context.close()


def draw_all(page) -> None:
    page.evaluate("nanostudyPage.drawAll()")


def names(page) -> list[str]:
    return page.locator("#experiments-table tbody th").all_text_contents()


def column(page, heading: str) -> list[str]:
    headings = page.locator("#experiments-table thead th").all_text_contents()
    return page.locator(f"#experiments-table tbody tr > :nth-child({headings.index(heading) + 1})").all_text_contents()


def test_the_page_asks_for_nothing_and_complains_of_nothing(opened, page_file):
    draw_all(opened)
    assert opened.asked == [page_file.as_uri()]
    assert opened.said == []


def test_every_figure_has_marks_and_words(opened):
    draw_all(opened)
    figures = opened.locator(".figure")
    assert figures.count() >= 9
    for figure in figures.all():
        name = figure.get_attribute("data-figure")
        panels = figure.locator(".panel")
        assert panels.count(), name
        for panel in panels.all():
            shown = panel.locator("svg, canvas").bounding_box()
            assert shown, name
            assert shown["height"] > 60, name
        words = figure.locator("[role=img]").get_attribute("aria-label")
        assert len(words) > 30, name
        assert any(character.isdigit() for character in words), name
    marks = opened.locator('[data-figure="effects"] svg .mark-symbol path').count()
    assert marks >= 6  # three settings and three pairs
    inked = opened.evaluate(
        """() => [...document.querySelectorAll('canvas')].map((canvas) => {
          const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          const colours = new Set();
          for (let i = 0; i < pixels.length; i += 4) colours.add(pixels[i] << 16 | pixels[i + 1] << 8 | pixels[i + 2]);
          return colours.size;
        })"""
    )
    assert inked
    assert min(inked) > 20


def test_nothing_in_a_name_a_reason_or_a_sample_runs(opened):
    draw_all(opened)
    opened.locator("#experiments-table tbody input").first.check()
    assert opened.evaluate("window.stolen") is None
    assert opened.locator("main img").count() == 0
    assert "<script>window.stolen = 1</script>" in opened.locator("#sample-cards").inner_text()
    assert opened.locator("h1").inner_text().startswith("study </script><script>")


def test_the_policy_stops_what_would_slip_through(opened):
    opened.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.stolen = 3\">')")
    opened.wait_for_timeout(100)
    assert opened.evaluate("window.stolen") is None
    refused = opened.evaluate(
        "new Promise((told) => { document.addEventListener('securitypolicyviolation', (e) => told(e.violatedDirective));"
        " fetch('https://example.org/').catch(() => 0); })"
    )
    assert refused == "connect-src"


def test_a_heading_sorts_by_mouse_and_keyboard(opened):
    heading = opened.locator('th[data-column="val_loss"]')
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    known = [float(text) for text in column(opened, "val") if text]
    assert known == sorted(known)
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    known = [float(text) for text in column(opened, "val") if text]
    assert known == sorted(known, reverse=True)
    assert column(opened, "val")[-1] == ""  # what is not known comes last, either way


def test_filters_narrow_the_table_and_say_so(opened):
    total = len(names(opened))
    assert opened.locator("#count").inner_text() == f"{total} experiments"
    opened.locator('select[data-filter="n_embd"]').select_option(json.dumps(256))
    assert set(column(opened, "n_embd")) == {"256"}
    assert opened.locator("#count").inner_text() == f"{total // 2} of {total} experiments"
    opened.locator("#find").fill("diverged")
    assert set(column(opened, "n_embd")) <= {"256"}
    opened.locator(".filters button[type=reset]").click()
    playwright.expect(opened.locator("#experiments-table tbody tr")).to_have_count(total)
    opened.locator("#find").fill("nothing is called this")
    assert names(opened) == []


def test_samples_of_chosen_experiments_stand_side_by_side(opened):
    cards = opened.locator(".sample h3 > span")
    at_first = cards.all_text_contents()
    assert len(at_first) == 3
    box = opened.locator("#experiments-table tbody tr input").nth(4)
    chosen = names(opened)[4]
    box.check()
    assert cards.all_text_contents() == [chosen]
    assert f"said {chosen}" in opened.locator(".sample pre").inner_text()
    assert opened.locator(".sample pre b").inner_text() == "ROMEO:"
    opened.locator("#sample-add").select_option(index=1)
    assert len(cards.all_text_contents()) == 2
    opened.locator(".sample h3 button").first.click()
    assert chosen not in cards.all_text_contents()
    assert not box.is_checked()


def test_curves_take_the_colour_of_any_setting(opened):
    draw_all(opened)

    legend = opened.locator('[data-figure="pareto"] .panel').first.locator("svg .role-legend-label")
    opened.locator("select.colour").first.select_option("n_embd")
    playwright.expect(legend).to_have_text(["128", "256"])
    opened.locator("select.colour").first.select_option("dropout")
    playwright.expect(legend).to_have_text(["0.1", "0.2"])
    others = opened.locator("select.colour").evaluate_all("(all) => all.map((one) => one.value)")
    assert set(others) == {"dropout"}


def test_dark_and_light_follow_the_reader(opened):
    draw_all(opened)

    def colours() -> tuple[str, str]:
        page = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        label = opened.locator('[data-figure="effects"] svg .role-axis-label text').first
        return page, label.get_attribute("fill")

    light = colours()
    opened.locator("#theme").click()
    playwright.expect(opened.locator("[data-figure=effects]")).to_have_attribute("data-drawn", "dark")
    dark = colours()
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    assert opened.said == []


@pytest.mark.parametrize("opened", [{"viewport": {"width": 390, "height": 844}}], indirect=True)
def test_a_phone_scrolls_tables_and_not_the_page(opened):
    draw_all(opened)
    assert opened.evaluate("document.documentElement.scrollWidth") == 390
    assert opened.locator(".scroll.tall").evaluate("(e) => e.scrollWidth > e.clientWidth")
    small = opened.locator("main p").evaluate_all(
        "(all) => Math.min(...all.map((e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert small >= 12


def test_a_keyboard_reaches_what_can_be_used(opened):
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "Skip to the report"
    reached = set()
    for _ in range(120):
        opened.keyboard.press("Tab")
        reached.add(opened.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"theme", "find", "SELECT", "BUTTON", "INPUT"} <= reached
