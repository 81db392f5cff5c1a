"""The ui in a browser: Chromium, headless, offline, against a finished study and one that runs. Skipped by name where there is none."""

import re
import subprocess
import sys

import pytest
from serving import serving, write_study

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
PATIENCE = 60_000  # milliseconds: the machine may be busy


@pytest.fixture
def open_page(browser):
    """Opens an address; fails at the end where the console said something or another server was asked."""
    contexts, said, asked = [], [], []

    def open_page(address: str, **how):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda problem: said.append(str(problem)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    expected = ("status of 400", "ERR_CONNECTION", "ERR_INCOMPLETE")  # what cannot be written; the server's end
    assert [text for text in said if not any(words in text for words in expected)] == []
    assert all(re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:)", url) for url in asked)


@pytest.fixture(scope="module")
def ui(studied):
    with serving(studied) as running:
        yield running


def texts(page) -> list[str]:
    return page.locator(".pen pre").all_text_contents()


def wait_until(page, expression: str) -> None:
    """The page's policy forbids what Playwright's own waiting evaluates there."""
    for _ in range(PATIENCE // 50):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(expression)


def written(page) -> None:
    expect(page.locator(".write")).to_be_visible(timeout=PATIENCE)


def test_a_finished_study_is_its_report_with_a_playground_over_one_selection(ui, open_page):
    page = open_page(ui.address)
    expect(page.locator("#report section#answer")).to_be_visible(timeout=PATIENCE)
    expect(page).to_have_url(re.compile(r"/\?place=1"))  # the token is gone
    assert page.locator("#report .figure").count() >= 4
    expect(page.locator("#report .figure svg").first).to_be_visible(timeout=PATIENCE)
    assert page.locator("#contents a[href='#playground']").count() == 1
    for row in (0, 3):
        page.locator("#experiments-table tbody input").nth(row).check()
    assert page.locator("select[name=which] option:checked").text_content() == "ticked in the table (2)"
    page.locator(".write").click()
    written(page)
    assert page.locator(".pen").count() == 2


def test_eight_models_write_side_by_side_and_can_be_stopped(ui, open_page):
    page = open_page(f"{ui.root}/?place=1&{ui.address.split('?')[1]}")
    page.locator("textarea").fill("the sea ")
    page.locator("select[name=which]").select_option(label="all of them (8)")
    page.locator("input[name=length]").fill("40")
    page.locator(".write").click()
    written(page)
    assert [len(text) for text in texts(page)] == [48] * 8
    assert all(text.startswith("the sea ") for text in texts(page))
    assert page.locator(".pen pre > i").count() >= 8
    assert all(float(mean.split()[0]) > 0 for mean in page.locator(".pen .mean").all_text_contents())
    assert page.locator(".pen p").first.text_content().startswith("validation loss ")
    before = texts(page)
    page.locator("input[name=length]").fill("2000")
    page.locator(".write").click()
    wait_until(page, "document.querySelector('.pen pre').textContent.length > 60")
    page.locator(".stop").click()
    written(page)
    lengths = {len(text) for text in texts(page)}
    assert max(lengths) < 2008
    assert max(lengths) - min(lengths) <= 2  # they grew together
    again = texts(page)
    assert all(
        text.startswith(start[: min(len(start), len(text))]) for text, start in zip(again, before, strict=True)
    )  # the same seed


def test_what_a_model_cannot_read_is_said(ui, open_page):
    page = open_page(ui.address)
    page.locator("textarea").fill("é")
    page.locator(".write").click()
    expect(page.locator(".ask .problem")).to_contain_text("does not know the character", timeout=PATIENCE)


def test_two_are_compared_blind_and_tallied(ui, open_page):
    page = open_page(ui.address)
    page.locator("input[name=length]").fill("20")
    for answers in (1, 2):
        page.locator(".blind" if answers == 1 else ".verdict .next").click()
        expect(page.locator(".verdict button").first).to_be_visible(timeout=PATIENCE)
        assert page.locator(".pen h3 > span:first-child").all_text_contents() == ["Left", "Right"]
        assert "loss" not in page.locator(".pens").inner_text()
        page.locator('.verdict [data-better="left"]').click()
        expect(page.locator(".tally")).to_contain_text(f"{answers} answer", timeout=PATIENCE)
        assert page.locator(".pen.better").count() == 1
        assert all("validation loss" in about for about in page.locator(".pen p").all_text_contents())


def test_a_shared_page_is_one_file_with_these_texts(ui, open_page, tmp_path):
    page = open_page(ui.address)
    page.locator("textarea").fill("no one ")
    page.locator("input[name=length]").fill("30")
    page.locator(".write").click()
    written(page)
    [first, *_] = texts(page)
    with page.expect_download() as download:
        page.locator(".share").click()
    download.value.save_as(tmp_path / "shared.html")
    content = (tmp_path / "shared.html").read_text(encoding="utf-8")
    assert first.split("\n")[0] in content
    assert "Content-Security-Policy" in content


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(ui, open_page, scheme):
    page = open_page(ui.address, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    expect(page.locator("#report section").first).to_be_visible(timeout=PATIENCE)
    page.locator(".write").click()
    written(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = page.evaluate(
        "[...document.querySelectorAll('#playground *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert wide == 0


def test_several_are_in_one_list(studied, open_page, tmp_path):
    run = sorted(path for path in studied.iterdir() if (path / "run.json").is_file())[0]
    with serving(studied, run) as ui:
        page = open_page(ui.address)
        expect(page.locator(".list li")).to_have_count(2, timeout=PATIENCE)
        page.locator(".list a").first.click()
        expect(page.locator("h1")).to_have_text("small", timeout=PATIENCE)
        assert page.locator("#places option").count() == 2
        expect(page.locator("#report section").first).to_be_visible(timeout=PATIENCE)


def test_a_study_is_watched_while_it_runs(open_page, tmp_path):
    """A real one, in processes of its own: begun after the page is open; it is prompted before it ends."""
    source = write_study(tmp_path, max_iters=1500, eval_interval=100, log_interval=5)
    words = ["study", "run", str(source), "--out", str(tmp_path / "small"), "--device=cpu", "--workers=1"]
    command = [sys.executable, "-m", "nanostudy", *words]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with serving(begin=tmp_path / "small") as ui:
        page = open_page(ui.address)
        expect(page.locator("#lede")).to_contain_text("has not begun", timeout=PATIENCE)
        with subprocess.Popen(command, **silent) as study:
            try:
                expect(page.locator("#workers p").first).to_contain_text("worker 0", timeout=PATIENCE)
                expect(page.locator("#experiments-table tbody tr")).to_have_count(8, timeout=PATIENCE)
                loss = page.locator("#experiments-table tbody tr", has_text="running").first.locator("td").nth(3)
                expect(loss).to_have_text(re.compile(r"\d\.\d{4}"), timeout=PATIENCE)
                before = page.evaluate("nanostudyPage.tables.batches.length")
                wait_until(page, f"nanostudyPage.tables.batches.length > {before}")
                expect(page.locator("#report .figure canvas").first).to_be_visible(timeout=PATIENCE)
                expect(page.locator("#playground")).to_be_visible(timeout=3 * PATIENCE)  # some have finished
                page.locator("input[name=length]").fill("10")
                page.locator(".write").click()
                written(page)
                assert page.locator(".pen pre > i").count()
                expect(page.locator("#newer button")).to_be_visible(timeout=3 * PATIENCE)
            finally:
                study.terminate()
        page.locator("#newer button").click()
        expect(page.locator("#report section#answer")).to_be_visible(timeout=PATIENCE)
