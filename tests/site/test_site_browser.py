"""The site in a real browser, headless, from files: no error, and everything works by keyboard."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium; install it or name it in $CHROMIUM")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of 1,280 x 900; whatever it complains of fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(f"not loaded: {request.url}"))
    yield page
    context.close()
    assert not said


@pytest.mark.slow
def test_every_sort_of_page_opens_without_an_error_and_fits_a_phone(page: Any, site: Path) -> None:
    sorts = [
        *(site / name for name in ("index.html", "runs/index.html", "models/index.html", "docs/choices.html")),
        *sorted((site / "artefacts").glob("*.html")),
        *sorted((site / "runs" / "wikitext103").glob("*.html")),
        *(site / "models" / f"{name}.html" for name in ("rodimus_plus", "griffin")),
    ]
    page.set_viewport_size({"width": 375, "height": 800})
    for path in sorts:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, path.name
        assert page.evaluate("window.broken") is None
        drawn = "[...document.images].every((one) => !one.src || (one.complete && one.naturalWidth > 0))"
        assert page.evaluate(drawn), f"{path.name}: every picture is there when the page is, also for print"


def test_a_wide_table_scrolls_in_its_box_beside_its_first_column(page: Any, site: Path) -> None:
    page.set_viewport_size({"width": 375, "height": 800})
    page.goto((site / "artefacts" / "table2.html").as_uri())
    box = page.get_by_role("region", name="Table 2")
    assert box.evaluate("(one) => one.scrollWidth") > 1000
    head = box.get_by_role("rowheader").first
    before = head.bounding_box()
    box.evaluate("(one) => { one.scrollLeft = 600; }")
    assert box.evaluate("(one) => one.scrollLeft") == 600
    assert head.bounding_box() == before
    assert before["width"] < 375 / 2
    assert page.evaluate("window.scrollX") == 0


@pytest.mark.parametrize("name", ["table2", "table10", "table11", "table22"])
def test_tables_are_printed_whole(page: Any, site: Path, name: str) -> None:
    """Broad ones on the long side of the paper: here US letter, less its margins, the shorter of the two usual ones."""
    page.goto((site / "artefacts" / f"{name}.html").as_uri())
    shape = re.search(rb"/MediaBox \[0 0 (\d+) (\d+)\]", page.pdf(prefer_css_page_size=True))
    assert shape is not None
    assert [int(side) for side in shape.groups()] == [792, 612]
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 965, "height": 700})
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for table in page.locator(".broad table").all():
        box = table.bounding_box()
        assert box["x"] + box["width"] <= 965
    assert not page.locator("thead button").first.is_visible()
    assert page.locator("thead th").first.inner_text()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert page.locator("thead th").first.get_by_role("button").inner_text()


def test_names_for_screen_readers(page: Any, site: Path) -> None:
    page.goto((site / "artefacts" / "figure1b.html").as_uri())
    for role, name in [
        ("navigation", "Site"),
        ("search", None),
        ("searchbox", "Search tables, figures, runs, models and docs"),
        ("button", "Dark"),
        ("link", "Enlarge: Figure 1b. MQAR, 1024 tokens, 256 pairs, d = 256"),
        ("main", None),
    ]:
        found = page.get_by_role(role, **({"name": name} if name else {}))
        assert found.first.is_visible(), (role, name)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('a, button, input')].filter((one) => !(one.textContent.trim() ||"
        " one.getAttribute('aria-label') || (one.labels && one.labels.length))).length"
    )
    assert unnamed == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"


def test_tables_sort_by_their_numbers(page: Any, site: Path) -> None:
    page.goto((site / "models" / "index.html").as_uri())
    head = page.get_by_role("columnheader", name="State at 16k")
    head.get_by_role("button").press("Enter")
    sizes = page.eval_on_selector_all(
        "tbody td:nth-child(6)", "(cells) => cells.map((one) => Number(one.dataset.sort))"
    )
    assert sizes == sorted(sizes)
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    again = page.eval_on_selector_all(
        "tbody td:nth-child(6)", "(cells) => cells.map((one) => Number(one.dataset.sort))"
    )
    assert again == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 5


def test_missing_numbers_sort_last_both_ways(page: Any, site: Path) -> None:
    page.goto((site / "artefacts" / "table1.html").as_uri())
    columns = page.evaluate(
        "[...document.querySelector('tbody tr').cells].map((_, at) => [...document.querySelectorAll('tbody tr')]"
        ".map((row) => row.cells[at].dataset.sort))"
    )
    index = next(at for at, values in enumerate(columns) if "" in values and any(values))
    for _ in range(2):
        page.locator("thead th").nth(index).get_by_role("button").click()
        cells = f"tbody td:nth-child({index + 1})"
        values = page.eval_on_selector_all(cells, "(cells) => cells.map((one) => one.dataset.sort)")
        given = [value for value in values if value]
        assert 0 < len(given) < len(values)
        assert all(values[: len(given)])


def test_search_by_keyboard(page: Any, site: Path) -> None:
    page.goto((site / "models" / "griffin.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("table 20")
    assert page.locator("#found a").first.inner_text().startswith("Table 20.")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/artefacts/table20.html")
    page.get_by_role("searchbox").fill("window.broken")
    assert page.evaluate("window.broken") is None


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("table 2", "Table 2. Downstream tasks, zero-shot table"),  # not Table 20
        ("TABLE 22", "Table 22. "),
        ("rodimus", "Model rodimus model"),  # before its runs
        ("rodimus+", "Model rodimus+ model"),
        ("b6357da5", "Run rodimus-b6357da5 run"),
        ("notation", "Table 3. Notation table"),
        ("unbiased estimator", "Table 21. "),  # in a note
        ("2.5e-4 resumed", ""),  # in no page together
        ("two-hop residual", "Table 17. The two-hop residual"),
        ("xiao sinks", "Model streaming_llm"),  # in what a model is
        ("checksums", "rodimus-lab docs"),  # in the text of the README
        ("warmup_steps 120", "Run "),  # what a run changed
    ],
)
def test_search_finds_titles_before_texts(page: Any, site: Path, typed: str, first: str) -> None:
    page.goto((site / "index.html").as_uri())
    page.get_by_role("searchbox").fill(typed)
    if not first:
        assert page.get_by_text("no pages found").is_visible()
        assert not page.locator("#found").is_visible()
        return
    assert page.locator("#found a").first.inner_text().startswith(first)


def test_the_list_of_pages_found_closes_and_opens(page: Any, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    box, found = page.get_by_role("searchbox"), page.get_by_role("list", name="Pages found")
    box.fill("perplexity")
    assert page.locator("#found-count").text_content().endswith("pages found, the first 12 are shown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.locator("#found a").nth(1).evaluate("(one) => one === document.activeElement")
    page.keyboard.press("Escape")
    assert not found.is_visible()
    assert box.evaluate("(one) => one === document.activeElement")
    page.keyboard.press("ArrowDown")
    assert found.is_visible()
    page.get_by_role("button", name="Dark").focus()
    assert not found.is_visible()


def test_pages_found_lie_over_tables_on_a_phone(page: Any, site: Path) -> None:
    page.set_viewport_size({"width": 375, "height": 800})
    page.goto((site / "artefacts" / "table2.html").as_uri())
    page.get_by_role("searchbox").fill("perplexity")
    links = page.locator("#found a").all()
    over = (
        "(one) => { const box = one.getBoundingClientRect(); return document.elementFromPoint(box.x + 9, box.y + 9) }"
    )
    inside = [link.evaluate(f"(one) => one.contains(({over})(one))") for link in links[:5]]
    assert inside == [True] * 5
    boxes = [page.locator(name).first.bounding_box() for name in ("#found", "thead")]
    assert boxes[0]["y"] + boxes[0]["height"] > boxes[1]["y"], "they do overlap"


def test_runs_are_filtered(page: Any, site: Path) -> None:
    page.goto((site / "runs" / "index.html").as_uri())
    page.get_by_label("Only runs with").fill("rodimus+ enwiki")
    assert page.locator("tbody tr:visible").count() == 1
    assert page.locator("#filter-count").text_content() == "1 of 6"


def test_light_and_dark_are_the_readers_choice(page: Any, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Dark").click()
    dark = page.evaluate(background)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(18, 22, 29)")
    page.reload()
    assert page.evaluate(background) == dark, "kept from page to page"
    assert page.get_by_role("button", name="Dark").get_attribute("aria-pressed") == "true"
    page.emulate_media(media="print")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    assert not page.locator("header").is_visible()


def test_text_stands_out_in_both_themes(page: Any, site: Path) -> None:
    """WCAG's contrast of at least 4.5 for every colour of text."""
    page.goto((site / "index.html").as_uri())
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        for name in ("--ink", "--soft", "--link", "--c0", "--c1", "--c2", "--c3"):
            for ground in ("--paper", "--tint"):
                value = "(name) => getComputedStyle(document.documentElement).getPropertyValue(name)"
                colours = [page.evaluate(value, one) for one in (name, ground)]
                assert contrast(*colours) >= 4.5, (theme, name, ground)


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour.strip()[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_figures_are_enlarged_and_closed_by_keyboard(page: Any, site: Path) -> None:
    page.goto((site / "artefacts" / "state_bytes.html").as_uri())
    page.get_by_role("link", name="Enlarge").press("Enter")
    dialog = page.get_by_role("dialog", name="Enlarged figure")
    assert dialog.is_visible()
    picture = dialog.locator("img")
    before = picture.bounding_box()["width"]
    page.keyboard.press("+")
    page.get_by_role("button", name="Larger").click()
    assert picture.bounding_box()["width"] == pytest.approx(2.25 * before, rel=0.01)
    page.get_by_role("button", name="Whole").click()
    assert picture.bounding_box()["width"] == pytest.approx(before)
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
