"""The corpus `pydoc`: the English documentation that every CPython carries, for runs with no data set and no network.

One document per topic of `pydoc_data.topics` (the language reference) and per module of the standard library (its
docstrings under the signatures they belong to). Modules are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rodimus_lab.data.corpus import CORPORA, Corpus

SKIPPED = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@CORPORA.register("pydoc")
class PydocCorpus(Corpus):
    """Deterministic on a given Python; about 2 MB. A document's split is a hash of its name, about 90 : 5 : 5."""

    name = "pydoc"
    note = (
        "About 2 MB of English documentation of the running CPython, for smoke runs; nothing published is comparable."
    )

    def source(self, split: str) -> str:
        self.require(split)
        return f"CPython {platform.python_version()}: pydoc_data.topics and the standard library's docstrings"

    def fingerprint(self, split: str) -> str | None:
        return f"{self.source(split)} (extraction 1)"

    def documents(self, split: str) -> Iterator[str]:
        self.require(split)
        for name, text in extract():
            if split_of(name) == split:
                yield text


def split_of(name: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 90 else "valid" if bucket < 95 else "test"


@cache
def extract() -> tuple[tuple[str, str], ...]:
    """All documents as (name, text), topics first, each sort by name."""
    return (*_topics(), *_modules(Path(sysconfig.get_paths()["stdlib"])))


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip()


def _modules(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if text := "\n\n".join(_docstrings(tree, name)):
            yield f"module {name}", text


def _docstrings(node: ast.AST, heading: str) -> Iterator[str]:
    """The docstring of a module, class or function below its heading, then those of what is defined inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield f"{heading}\n\n{text}"
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from _docstrings(child, f"class {child.name}")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"def {child.name}({ast.unparse(child.args)})")
