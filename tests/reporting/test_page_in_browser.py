"""The page in a browser: Chromium, headless, offline. Skipped by name where there is none."""

import json
from pathlib import Path

import pytest
from hostile import hostile

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


@pytest.fixture
def page_file(written) -> Path:
    return written.page


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


def counted(page) -> str:
    return page.locator(".count").inner_text()


def test_an_expression_says_what_is_shown(opened):
    """In the table, in every figure that has experiments, and in the samples."""
    draw_all(opened)
    total = len(names(opened))
    assert counted(opened) == f"{total} experiments"
    opened.locator("#where").fill("n_embd == 256 and val_loss < 9")
    shown = set(column(opened, "experiment"))
    assert set(column(opened, "n_embd")) == {"256"}
    assert 0 < len(shown) < total // 2 + 1
    assert counted(opened) == f"{len(shown)} of {total} experiments"
    opened.wait_for_timeout(300)
    drawn = opened.evaluate(
        """() => Object.fromEntries([...nanostudyPage.views.entries()].map(([element, { view, named }]) =>
          [element.dataset.key, Object.keys(named).flatMap((name) => view.data(name)).filter((row) => row.i !== undefined)
            .map((row) => nanostudyPage.selection.rows[row.i].n_embd)]).filter(([, values]) => values.length))"""
    )
    assert {"curves.0", "curves.1", "gap.0", "pareto.0", "parallel.0", "ranking.0", "scaling.0"} <= set(drawn)
    assert {value for values in drawn.values() for value in values} == {256}
    assert set(opened.locator("#sample-cards h3 > span").all_text_contents()) <= shown


@pytest.mark.parametrize(
    ("expression", "test"),
    [
        (
            "val_loss < 2.0 and dropout == 0.1",
            lambda r: r["val_loss"] is not None and r["val_loss"] < 2.0 and r["dropout"] == 0.1,
        ),
        ("not n_embd == 128 or seed = 2", lambda r: r["n_embd"] != 128 or r["seed"] == 2),
        (
            "n_head in [4, 16] and (seed == 1 or dropout >= 0.2)",
            lambda r: r["n_head"] == 4 and (r["seed"] == 1 or r["dropout"] >= 0.2),
        ),
        ("1.9 <= val_loss <= 2.1", lambda r: r["val_loss"] is not None and 1.9 <= r["val_loss"] <= 2.1),
        ("diverged", lambda r: r["status"] == "diverged"),
        ('name ~ "E256" and status != waiting', lambda r: "E256" in r["name"] and r["status"] != "waiting"),
        ("E256 s1", None),
        ("val_los < 2", None),
        ("val_loss <", None),
        ("(val_loss < 2", None),
        ("val_loss", None),
        ("constructor.constructor('window.stolen = 1')()", None),
    ],
)
def test_expressions_mean_what_they_say(opened, expression, test):
    """As Python has it; what has no meaning is said, and changes nothing."""
    rows = opened.evaluate("nanostudyPage.tables.experiments")
    opened.locator("#where").fill(expression)
    problem = opened.locator("#problem").inner_text()
    shown = set(opened.evaluate("[...nanostudyPage.selection.shown]"))
    assert shown == {row["i"] for row in rows if test is None or test(row)}
    assert bool(problem) == (test is None)
    assert opened.evaluate("window.stolen") is None


def test_values_from_the_list_make_the_expression(opened):
    add = opened.locator("#filter-add")
    add.select_option(json.dumps(["n_embd", 256], separators=(",", ":")))
    add.select_option(json.dumps(["dropout", 0.1], separators=(",", ":")))
    add.select_option(json.dumps(["n_embd", 128], separators=(",", ":")))
    assert opened.locator("#where").input_value() == "dropout == 0.1 and n_embd == 128"
    opened.locator(".filters .show-all").click()
    assert opened.locator("#where").input_value() == ""


def test_effects_and_means_are_those_of_what_is_shown(opened):
    """Matched differences, as pandas has them."""
    draw_all(opened)
    opened.locator("#where").fill("dropout == 0.2 and seed == 1")
    opened.wait_for_timeout(300)
    table = hostile().experiments.query("status == 'finished' and dropout == 0.2 and seed == 1")
    drawn = opened.evaluate(
        """(figure) => [...nanostudyPage.views.entries()].filter(([element]) => element.dataset.key === figure)
          .flatMap(([, { view, named }]) => Object.keys(named).flatMap((name) => view.data(name)))""",
        "effects.0",
    )
    effects = {row["column"]: row["effect"] for row in drawn if "effect" in row}
    assert set(effects) == {"n_embd", "n_head"}
    by = table.set_index(["n_embd", "n_head"])["val_loss"].unstack("n_embd").dropna()
    assert effects["n_embd"] == pytest.approx((by[256] - by[128]).mean())
    assert "without intervals" in opened.locator("#figure-effects figcaption").inner_text()
    assert "Of all experiments" in opened.locator("#figure-variance figcaption").inner_text()


PLACE = """([key, x, y]) => {
  const element = document.querySelector(`[data-key="${key}"]`);
  element.scrollIntoView({ block: "center", behavior: "instant" });
  const { view } = nanostudyPage.views.get(element);
  const box = element.querySelector("svg, canvas").getBoundingClientRect();
  const at = (axis, value) => view.scale(axis)(value) + view.origin()[axis === "x" ? 0 : 1] + view.padding()[axis === "x" ? "left" : "top"];
  return [box.left + at("x", x), box.top + at("y", y)];
}"""


def test_a_brush_on_parallel_coordinates_narrows(opened):
    draw_all(opened)
    x, low = opened.evaluate(PLACE, ["parallel.0", "validation loss", 0.0])
    _, middle = opened.evaluate(PLACE, ["parallel.0", "validation loss", 0.5])
    opened.mouse.move(x, low)
    opened.mouse.down()
    opened.mouse.move(x, middle, steps=3)
    opened.mouse.up()
    rows = [row for row in opened.evaluate("nanostudyPage.tables.experiments") if row["val_loss"] is not None]
    losses = sorted(row["val_loss"] for row in rows)
    middle_loss = (losses[0] + losses[-1]) / 2
    shown = opened.evaluate("[...nanostudyPage.selection.shown]")
    near = {row["i"] for row in rows if abs(row["val_loss"] - middle_loss) < 0.01}
    assert set(shown) - near == {row["i"] for row in rows if row["val_loss"] < middle_loss} - near
    x, y = opened.evaluate(PLACE, ["parallel.0", "n_embd", 0.25])
    opened.mouse.click(x, y)
    assert opened.locator("#where").input_value().endswith("and n_embd == 128")


def test_the_nearest_line_says_its_settings_and_a_click_ticks_it(opened):
    draw_all(opened)
    last = "nanostudyPage.tables.curves.filter((row, k, all) => row.i !== all[k + 1]?.i)"
    curve = max(opened.evaluate(last), key=lambda row: row["val_loss"] or 0)  # the highest line
    x, y = opened.evaluate(PLACE, ["curves.0", curve["step"], curve["val_loss"]])
    opened.mouse.move(x, y)
    said = opened.locator("#tip").inner_text()
    experiment = opened.evaluate(f"nanostudyPage.tables.experiments[{curve['i']}]")
    assert experiment["short"] in said
    assert f"dropout{experiment['dropout']}" in said
    assert f"{curve['val_loss']:.4f}" in said
    opened.mouse.down()
    opened.mouse.up()
    assert opened.evaluate("[...nanostudyPage.selection.state.ticked]") == [curve["i"]]
    opened.locator("#selected .untick").click()
    assert opened.locator("#experiments-table input:checked").count() == 0


def test_a_click_on_a_dot_ticks_it(opened):
    draw_all(opened)
    row = max(opened.evaluate("nanostudyPage.tables.experiments"), key=lambda row: row["val_loss"] or 0)
    x, y = opened.evaluate(PLACE, ["pareto.0", row["parameters"], row["val_loss"]])
    opened.mouse.click(x, y)
    assert opened.evaluate("[...nanostudyPage.selection.state.ticked]") == [row["i"]]
    assert opened.locator("#sample-cards h3 > span").all_text_contents() == [row["short"]]


def test_the_address_keeps_the_selection(opened, browser):
    draw_all(opened)
    opened.locator("#where").fill("n_embd == 256")
    opened.locator("#experiments-table tbody input").nth(1).check()
    opened.locator("select.colour").first.select_option("dropout")
    opened.locator('th[data-column="seed"] button').click()
    x, y = opened.evaluate(PLACE, ["gap.1", 100, 0.02])
    opened.mouse.move(x, y)
    opened.mouse.down()
    opened.mouse.move(x + 80, y - 60, steps=2)
    opened.mouse.up()
    assert "zoom=" in opened.url
    again = browser.new_page()
    again.goto(opened.url)
    draw_all(again)
    for of in ("selection.query", "selection.state.zooms", "selection.shown.size"):
        assert again.evaluate(f"nanostudyPage.{of}") == opened.evaluate(f"nanostudyPage.{of}")
    ends = "[...nanostudyPage.views.entries()].find(([e]) => e.dataset.key === 'gap.1')[1].view.scale('x').domain()"
    again.wait_for_timeout(200)
    assert again.evaluate(ends) == opened.evaluate(ends)
    assert again.evaluate(ends)[0] == pytest.approx(100, abs=5)
    assert names(again) == names(opened)
    again.close()


def test_numbers_are_rounded_once(opened):
    """What the table shows is Python's rounding of the number itself."""
    rows = opened.evaluate("nanostudyPage.tables.experiments")
    by_name = {row["short"]: row for row in rows}
    results = hostile().experiments
    for heading, key in (("val", "val_loss"), ("train", "train_loss"), ("gap", "gap")):
        for name, text in zip(names(opened), column(opened, heading), strict=True):
            value = results[key].iloc[by_name[name]["i"]]
            assert text == ("" if value != value else f"{value:.4f}".replace("-", "−"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_no_label_is_cut_and_links_land(browser, page_file, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 860}, color_scheme=scheme)
    page.goto(page_file.as_uri())
    section = page.locator("nav a").nth(-3).get_attribute("href")
    page.evaluate("document.getElementById('contents').open = true")
    page.locator(f'nav a[href="{section}"]').click()
    page.wait_for_function(
        "() => { const at = scrollY; return new Promise((done) => setTimeout(() => done(at && at === scrollY), 250)); }"
    )
    top = page.locator(section).bounding_box()["y"]
    end = page.evaluate("document.documentElement.scrollHeight - innerHeight - scrollY")
    assert abs(top) < 40 or end < 2
    draw_all(page)
    assert abs(page.locator(section).bounding_box()["y"]) < 40 or end < 2
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.panel svg')].flatMap((svg) => {
          const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll('text')].filter((text) => {
            const own = text.getBoundingClientRect();
            return own.width && (own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1);
          }).map((text) => `${svg.closest('.figure').dataset.figure}: ${text.textContent}`);
        })"""
    )
    assert cut == []
    words = page.locator(".panel svg text").all_text_contents()
    assert not [text for text in words if text.endswith("…")]
    faint = page.evaluate(
        """() => {
          const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05; };
          return [...document.querySelectorAll('.panel svg .mark-line path, .panel svg .mark-rule line, .panel svg .mark-symbol path')].map((mark) => {
            const [style, ground] = [getComputedStyle(mark), light(getComputedStyle(mark.closest('.figure')).backgroundColor)];
            const own = light(style.stroke === 'none' ? style.fill : style.stroke);
            return mark.closest('.role-mark') && [mark.closest('.figure').dataset.figure, Math.max(own, ground) / Math.min(own, ground)];
          }).filter((one) => one && one[1] < 1.6).map(String);
        }"""
    )
    assert not faint
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_samples_of_chosen_experiments_stand_side_by_side(opened):
    cards = opened.locator("#sample-cards h3 > span")
    at_first = cards.all_text_contents()
    assert len(at_first) == 3
    box = opened.locator("#experiments-table tbody tr input").nth(4)
    chosen = names(opened)[4]
    box.check()
    assert cards.all_text_contents() == [chosen]
    assert (
        f"said {opened.locator('#sample-cards h3 > span').get_attribute('title')}"
        in opened.locator("#sample-cards pre").inner_text()
    )
    assert opened.locator("#sample-cards pre b").inner_text() == "ROMEO:"
    opened.locator("#sample-add").select_option(index=1)
    assert len(cards.all_text_contents()) == 2
    opened.locator("#sample-cards h3 button").first.click()
    assert chosen not in cards.all_text_contents()
    assert not box.is_checked()


def test_curves_take_the_colour_of_any_setting(opened):
    draw_all(opened)

    legend = opened.locator('[data-figure="pareto"] .panel').first.locator("svg .role-legend-label")
    opened.locator("select.colour").first.select_option("n_embd")
    expect(legend).to_have_text(["128", "256"])
    opened.locator("select.colour").first.select_option("dropout")
    expect(legend).to_have_text(["0.1", "0.2"])
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
    expect(opened.locator("[data-figure=effects]")).to_have_attribute("data-drawn", "dark")
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
    assert {"theme", "where", "filter-add", "BUTTON", "INPUT"} <= reached
