"""The project's texts (README and docs) as pages: Markdown without raw HTML, links turned to the site's own pages."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from rodimus_lab.site.pages import breadth

OUTSIDE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
WORDS = ("text", "code_inline", "fence", "code_block")
TABLE_HEAD = re.compile(r"<table>.*?</tr>", re.DOTALL)
PICTURE = re.compile(r"docs/([A-Za-z0-9_-]+\.(?:svg|png))")
RESULT = re.compile(r"results/(?:tables|figures)/([^/]+)\.(?:md|tex|csv|svg|png|pdf)")


@dataclass(frozen=True)
class Document:
    """A text as HTML that was made of Markdown whose every piece was escaped. `plain` is it without any marks,
    `pictures` are the files in docs/ that it shows."""

    title: str
    address: str
    body: Markup
    plain: str
    pictures: Sequence[str] = ()


def documents(root: Path, artefacts: Mapping[str, str]) -> list[Document]:
    """README.md and docs/*.md under `root`; `artefacts` are the addresses of pages by the names of result files."""
    sources = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    found = [path for path in sources if path.is_file()]
    addresses = {path.relative_to(root).as_posix(): f"docs/{path.stem.lower()}.html" for path in found}
    return [_document(path, root, addresses, artefacts) for path in found]


def _document(path: Path, root: Path, addresses: Mapping[str, str], artefacts: Mapping[str, str]) -> Document:
    source = path.relative_to(root).as_posix()
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(path.read_text(encoding="utf-8"))
    heads = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    for token in tokens:
        _identify(token, tokens)
        if token.children:
            token.children = _relinked(token.children, source, addresses, artefacts)
    body = markdown.renderer.render(tokens, markdown.options, {})
    body = TABLE_HEAD.sub(_boxed, body).replace("</table>", "</table></div>").replace("<pre>", '<pre tabindex="0">')
    images = [piece for token in tokens for piece in token.children or () if piece.type == "image"]
    shown = [PICTURE.fullmatch(f"docs/{image.attrs['src']}") for image in images]
    pictures = [found[1] for found in shown if found and (root / "docs" / found[1]).is_file()]
    return Document(heads[0] if heads else path.stem, addresses[source], Markup(body), _plain(tokens), pictures)


def _plain(tokens: Sequence[Token]) -> str:
    parts = ("".join(map(_said, token.children or [token])) for token in tokens)
    return " ".join(filter(None, parts))


def _said(token: Token) -> str:
    return token.content if token.type in WORDS else " " if token.type == "softbreak" else ""


def _boxed(head: re.Match[str]) -> str:
    classes = f"wide{breadth(head[0].count('<th'))}"
    return f'<div class="{classes}" tabindex="0" role="region" aria-label="table">{head[0]}'


def _identify(token: Token, tokens: list[Token]) -> None:
    """Headings get the ids that links to them use."""
    if token.type == "heading_open":
        text = tokens[tokens.index(token) + 1].content
        token.attrSet("id", re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))


def _relinked(
    tokens: list[Token], source: str, addresses: Mapping[str, str], artefacts: Mapping[str, str]
) -> list[Token]:
    """Links to pages of the site, and the text alone of links to what is not in it; pictures from the site's own."""
    kept: list[Token] = []
    dropped = 0
    for token in tokens:
        if token.type == "link_open":
            target = _target(str(token.attrs["href"]), source, addresses, artefacts)
            if target is None:
                dropped += 1
                continue
            token.attrSet("href", target)
        elif token.type == "link_close" and dropped:
            dropped -= 1
            continue
        elif token.type == "image":
            inside = _inside(str(token.attrs["src"]), source)
            drawn, own = RESULT.fullmatch(inside), PICTURE.fullmatch(inside)
            if drawn is not None and drawn[1] in artefacts:
                token.attrSet("src", f"../figures/{quote(drawn[1])}.svg")
            elif own is not None:
                token.attrSet("src", own[1])
            else:
                token = Token("text", "", 0, content=token.content)
        kept.append(token)
    return kept


def _target(href: str, source: str, addresses: Mapping[str, str], artefacts: Mapping[str, str]) -> str | None:
    if OUTSIDE.match(href):
        return href
    path, _, part = href.partition("#")
    if not path:
        return href
    inside = _inside(path, source)
    result = RESULT.fullmatch(inside)
    if inside in addresses:
        return f"../{addresses[inside]}{'#' + part if part else ''}"
    if result is not None and result[1] in artefacts:
        return f"../{quote(artefacts[result[1]])}"
    return "../index.html" if inside.startswith("results/tables") else None


def _inside(path: str, source: str) -> str:
    """A link's path from the project's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(path)))
