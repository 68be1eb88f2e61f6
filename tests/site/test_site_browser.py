"""The site in a real browser, headless, from files: no error, and everything works by keyboard."""

from __future__ import annotations

import os
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
        *sorted((site / "artefacts").glob("*.html"))[:6],
        *sorted((site / "runs" / "wikitext103").glob("*.html")),
        *(site / "models" / f"{name}.html" for name in ("rodimus_plus", "griffin")),
    ]
    page.set_viewport_size({"width": 375, "height": 800})
    for path in sorts:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, path.name
        assert page.evaluate("window.broken") is None
        assert page.evaluate("[...document.images].every((one) => !one.complete || !one.src || one.naturalWidth > 0)")


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
    assert page.locator("#found-count").text_content() != "0 pages found"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/artefacts/table20.html")
    page.get_by_role("searchbox").fill("window.broken")
    assert page.evaluate("window.broken") is None


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
