"""The pages as files: they hold together, load nothing from elsewhere, and escape whatever a record holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from rodimus_lab.errors import UserError
from rodimus_lab.nn.zoo import MODELS
from rodimus_lab.records import PROJECT_ROOT, load_records
from rodimus_lab.registry import load_plugins
from rodimus_lab.report.artefacts import PAPER
from rodimus_lab.site import build_site
from rodimus_lab.site.charts import charts_of
from rodimus_lab.site.documents import documents
from rodimus_lab.site.pages import Pages
from rodimus_lab.site.views import ArtefactView, FigureView, base_of

COMMITTED = PROJECT_ROOT / "results" / "runs"
HOSTILE_RUN = "runs/wikitext103/rodimus-0badc0de.html"


class Page(HTMLParser):
    """What a page links to, loads and names."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "a":
            self.links.append(str(given["href"]))
        elif tag in ("img", "script", "link", "source") and (given.get("src") or given.get("href")):
            self.loads.append(str(given.get("src") or given.get("href")))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_artefact_run_and_model_has_its_page(site: Path) -> None:
    load_plugins()  # The site may be another process's.
    for artefact in PAPER:
        assert (site / "artefacts" / f"{artefact.name}.html").is_file()
    assert len(list((site / "models").glob("*.html"))) == len(list(MODELS)) + 1
    assert len(list((site / "runs" / "wikitext103").glob("*.html"))) == 4
    assert (site / "docs" / "readme.html").is_file()


def test_every_link_and_everything_loaded_is_there(pages: dict[Path, Page]) -> None:
    broken = [f"{path.name}: {link}" for path, page in pages.items() for link in dangling(path, page, pages)]
    assert not broken
    outward = [link for page in pages.values() for link in page.loads if urlsplit(link).scheme not in ("", "data")]
    assert not outward


def dangling(path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    for link in [*page.links, *page.loads]:
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_file() or (parts.fragment and parts.fragment not in pages[target].ids):
            yield link


def test_pages_are_named_for_screen_readers(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        tags = [tag for tag, _ in page.tags]
        for landmark in ("header", "nav", "main", "footer", "h1", "title"):
            assert landmark in tags, f"{path.name} has no {landmark}"
        assert tags.count("h1") == 1, path.name
        assert ("html", "en") in [(tag, attributes.get("lang")) for tag, attributes in page.tags]
        assert len(page.ids) == len(set(page.ids)), path.name
        assert all("alt" in attributes for tag, attributes in page.tags if tag == "img")
        drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
        assert all(attributes.get("aria-labelledby") and attributes.get("role") == "img" for attributes in drawn)


def test_nothing_of_a_record_is_markup(site: Path, pages: dict[Path, Page]) -> None:
    page = pages[site / HOSTILE_RUN]
    assert page.text.count("<script>window.broken=1</script>") >= 5, "shown, as text"
    for path, one in pages.items():
        assert all("broken" not in str(attributes.get("onerror")) for _, attributes in one.tags), path.name
        assert [tag for tag, _ in one.tags].count("script") == 2, path.name
    assert "</script>" not in (site / "search-index.js").read_text()


def test_a_run_says_what_it_is(site: Path, pages: dict[Path, Page]) -> None:
    text = " ".join(pages[site / "runs" / "wikitext103" / "rodimus-b6357da5.html"].text.split())
    warmup = "schedule.warmup_steps 2,000 120"
    for words in ("test_ppl 59.48", "Training loss", warmup, "No samples were kept", "Table 1"):
        assert words in text
    assert "There" in text
    hostile = " ".join(pages[site / HOSTILE_RUN].text.split())
    assert "Samples" in hostile
    assert "No samples were kept" not in hostile


def test_scores_on_texts_that_were_trained_on_say_so(site: Path, pages: dict[Path, Page]) -> None:
    said = "at least 24 of the 48 articles of SQuAD's dev set"
    telling = {path for path, page in pages.items() if said in " ".join(page.text.split())}
    assert telling == {site / "runs" / "eval" / "rodimus-0badf00d.html", site / "artefacts" / "table11.html"}


def test_the_base_is_the_one_that_the_record_names(tmp_path: Path) -> None:
    """A run of a grid, whose experiment makes many recipes of one model, has none unless its record names one."""
    (record,) = [one for one in load_records(COMMITTED, "wikitext103") if one.id == "rodimus-b6357da5"]
    assert base_of(record)[0] == "the recipe of rodimus at the paper's budget"
    grid = replace(record, experiment="mqar", path=tmp_path)
    assert base_of(grid) == ("", [])
    departure = {"base": "rodimus-12345678", "changes": {"model.tau": [{"fixed": None}, None]}}
    (tmp_path / "record.json").write_text(json.dumps({"departure": departure}))
    assert base_of(grid) == (
        "the recipe rodimus-12345678 that it was made from",
        [("model.tau", {"fixed": None}, None)],
    )


def test_artefacts_say_what_was_not_run(site: Path, pages: dict[Path, Page]) -> None:
    index = " ".join(pages[site / "index.html"].text.split())
    assert re.search(r"Table 1 Perplexity on WikiText-103 \d+ numbers measured, \d+ not run", index)
    assert "Table 6 Perplexity on the Pile, 350M not run" in index
    assert "Table 5 Training settings on WikiText-103 and the Pile settings" in index
    text = " ".join(pages[site / "artefacts" / "table1.html"].text.split())
    assert "standing in for wikitext-103" in text


def test_a_figure_of_runs_leads_to_them_and_they_to_it(site: Path, pages: dict[Path, Page]) -> None:
    """Figure 8 is drawn of a record of gates, and its note names the run whose gates they are."""
    pytest.importorskip("matplotlib")
    index = " ".join(pages[site / "index.html"].text.split())
    assert "Figure 8 The gates of a trained layer over a sentence measured" in index
    assert "Figure 7 The gates against g and the temperature computed" in index
    text = " ".join(pages[site / "artefacts" / "figure8.html"].text.split())
    assert "rodimus-b6357da5: enwiki-25k standing in for wikitext-103, gpt2 tokens, short budget" in text
    assert "g and exp(-g): the same run read without its temperature" in text
    for run in ("gates/rodimus-0badcafe", "wikitext103/rodimus-b6357da5"):
        assert "Figure 8" in " ".join(pages[site / "runs" / f"{run}.html"].text.split())


def test_a_list_of_no_runs_says_so(tmp_path: Path) -> None:
    Pages(tmp_path).write("runs.html", "runs/index.html", {"title": "Runs", "runs": []})
    text = (tmp_path / "runs" / "index.html").read_text()
    assert "No run is finished yet." in text
    assert "<table" not in text


def test_models_show_hops_costs_and_table_4(site: Path, pages: dict[Path, Page]) -> None:
    text = " ".join(pages[site / "models" / "rodimus_plus.html"].text.split())
    assert "hop 2: norm and windowed attention, then norm and swiglu feed-forward, added to the residual stream" in text
    assert "48,454,400" in text
    mamba2 = " ".join(pages[site / "models" / "mamba2.html"].text.split())
    assert "Recurrent type" in mamba2


def test_it_holds_no_absolute_path_and_no_large_file(site: Path) -> None:
    for path in site.rglob("*"):
        if path.is_file():
            assert path.stat().st_size < 1_000_000, path.name
        if path.suffix in (".html", ".js", ".css"):
            text = path.read_text(encoding="utf-8")
            assert str(PROJECT_ROOT) not in text
            assert str(site) not in text


def test_figures_are_taken_over_or_drawn_anew(site: Path) -> None:
    """One of other numbers than the records' is drawn again."""
    pytest.importorskip("matplotlib")
    kept = site.parent / "figures"
    assert (site / "figures" / "state_bytes.pdf").read_bytes() == (kept / "state_bytes.pdf").read_bytes()
    assert (site / "figures" / "figure01b.csv").read_text() != (kept / "figure01b.csv").read_text()
    assert (site / "figures" / "figure01b.svg").is_file()


def test_a_folder_that_is_no_site_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is no site that this command built; move it away"):
        build_site(tmp_path / "site")
    assert (tmp_path / "site" / "mine.txt").read_text() == "mine"


def test_the_search_index_names_every_page(site: Path, pages: dict[Path, Page]) -> None:
    text = (site / "search-index.js").read_text()
    entries = json.loads(text.removeprefix("window.rodimusLabPages=").removesuffix(";\n"))
    found = {unquote(entry["address"]) for entry in entries}
    assert found == {path.relative_to(site).as_posix() for path in pages} - {"index.html"}


@pytest.mark.slow
def test_the_same_records_make_the_same_pages(site: Path, tmp_path: Path) -> None:
    """Byte by byte, also where Python orders sets otherwise."""
    code = "import sys, pathlib, rodimus_lab.site; rodimus_lab.site.build_site(pathlib.Path(sys.argv[1]))"
    settings = {"PYTHONHASHSEED": "7", "RODIMUS_LAB_RESULTS": str(site.parent / "runs")}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "site"], env=os.environ | settings, check=True, cwd=PROJECT_ROOT
    )
    made = {path.relative_to(tmp_path / "site"): path for path in (tmp_path / "site").rglob("*") if path.is_file()}
    assert made.keys() == {path.relative_to(site) for path in site.rglob("*") if path.is_file()}
    text = (".html", ".js", ".css", ".md", ".tex", ".csv")
    other = [
        name for name, path in made.items() if name.suffix in text and path.read_bytes() != (site / name).read_bytes()
    ]
    assert not other


def test_curves_are_drawn_of_what_was_logged() -> None:
    lines = [{"step": step, "loss": 10 / step, "note": "text"} for step in range(1, 1001)]
    lines.append({"step": 1000, "valid_ppl": 50.0, "test_accuracy": 0.5})
    loss, perplexity, accuracy = charts_of(lines)
    assert loss.curves[0].told == "loss: from 10 at step 1 to 0.01 at step 1,000"
    assert loss.curves[0].path.count("L") < 302
    assert (len(perplexity.curves[0].dots), accuracy.curves[0].told[-19:]) == (1, "to 50 at step 1,000")
    for chart in (loss, perplexity, accuracy):
        assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in chart.curves[0].dots)
    assert charts_of([]) == []


@pytest.mark.parametrize(
    ("source", "status"),
    [("paper", "not run"), ("not run", "not run"), ("computed", "computed"), ("rodimus-b6357da5", "measured")],
)
def test_only_what_was_computed_is_called_so(source: str, status: str) -> None:
    runs = frozenset({source} & {"rodimus-b6357da5"})
    figure = FigureView("figure05", "t", "", ("x", "y", "source"), [("1", "2", source)], 0, (), runs)
    assert ArtefactView("figure5", "Figure 5", "t", "measured", figures=[figure]).status == status


def test_diagrams_add_what_the_block_adds() -> None:
    """Rodimus+ has a sum for each sublayer, two of them on the residual stream."""
    from rodimus_lab.nn.zoo import model_config
    from rodimus_lab.report.diagram import diagrams_of

    (drawn,) = diagrams_of(model_config("rodimus+"))
    sums = [box.y for box in drawn.boxes if box.sort == "sum"]
    assert len(sums) == 3
    assert sums.count(max(sums)) == 2
    assert [diagram.title.partition(":")[0] for diagram in diagrams_of(model_config("griffin"))] == [
        "Part 1 of 2 of a pattern that stands 2 times",
        "Part 2 of 2 of a pattern that stands 2 times",
    ]


def test_texts_link_to_pages_and_to_nothing_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "# One\n[two](docs/two.md#a-part) [code](Makefile) [t](results/tables/table1.md) "
        "<b>bold</b> [x](javascript:1)\n"
    )
    (tmp_path / "docs" / "two.md").write_text("# Two\n## A part\n[one](../README.md)\n")
    one, two = documents(tmp_path, {"table1": "artefacts/table1.html"})
    assert '<a href="../docs/two.html#a-part">two</a> code <a href="../artefacts/table1.html">t</a>' in one.body
    assert "&lt;b&gt;" in one.body
    assert 'href="javascript' not in one.body
    assert '<h2 id="a-part">' in two.body
    assert 'href="../docs/readme.html"' in two.body
