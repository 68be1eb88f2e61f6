"""Rendering: templates, addresses from page to page, the index that the search reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rodimus_lab.site.values import bytes_text, shortened

HERE = Path(__file__).resolve().parent
BROAD, DENSE = 8, 15


class Entry(NamedTuple):
    """A page as the search finds it: by its title, and after those by its text."""

    title: str
    kind: str
    address: str
    text: str = ""


class Pages:
    """Writes pages into a folder and keeps the index of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: list[Entry] = []
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.templates.filters["grouped"] = lambda number: f"{number:,}"
        self.templates.filters["breadth"] = breadth
        self.templates.filters["bytes"] = bytes_text
        self.templates.filters["shortened"] = shortened
        self.templates.filters["slim"] = lambda number: f"{number:g}"

    def write(self, template: str, address: str, values: Mapping[str, Any], entry: Entry | None = None) -> None:
        """Render one page to `address`, from the site's root."""
        root = "../" * address.count("/")

        def to(target: str) -> str:
            return root + quote(target, safe="/#")

        page = self.templates.get_template(template).render(to=to, root=root, address=address, **values)
        path = self.folder / address
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", newline="\n")
        if entry is not None:
            self.entries.append(entry)

    def write_static(self) -> None:
        """Style, script and the search's index, a script because pages opened as files may read no other file."""
        for source in sorted((HERE / "static").iterdir()):
            (self.folder / source.name).write_bytes(source.read_bytes())
        entries = [
            {"title": e.title, "kind": e.kind, "address": quote(e.address, safe="/#"), "text": " ".join(e.text.split())}
            for e in self.entries
        ]
        text = json.dumps(entries, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
        (self.folder / "search-index.js").write_text(
            f"window.rodimusLabPages={text};\n", encoding="utf-8", newline="\n"
        )


def breadth(columns: int) -> str:
    """The style's classes for a table of so many columns: a broad one is printed on the paper's long side, a dense one
    in small type under upright heads."""
    return " broad" * (columns > BROAD) + " dense" * (columns > DENSE)
