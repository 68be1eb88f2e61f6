"""Finding a corpus by its name, or by the path of a file or folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rodimus_lab.config import did_you_mean
from rodimus_lab.data import hub, pydoc, wikitext  # noqa: F401  (they enter their corpora)
from rodimus_lab.data.corpus import CORPORA, Corpus
from rodimus_lab.data.files import FileCorpus
from rodimus_lab.data.subset import Subset, parse
from rodimus_lab.errors import UserError


def open_corpus(name: str) -> Corpus:
    """The corpus of that name, or of the file or folder at that path; with `:COUNT` (such as `pile:7b`) and perhaps
    `@SEED` behind it so many tokens of it. Raises `UserError` where there is neither."""
    if name not in CORPORA:
        if (asked := parse(name)) is not None and not Path(name).expanduser().exists():
            whole = open_corpus(asked[0])
            return Subset(whole, asked[1], asked[2], whole.name + asked[3])
        if not name:
            raise UserError(f"the corpus has no name; give a file, a folder or one of: {', '.join(CORPORA)}")
        path = Path(name).expanduser()
        if path.exists():
            return FileCorpus.at(path)
        if ":" in name and "/" not in name:
            raise UserError(
                f"there is no corpus named {name!r}; a part of one is CORPUS:COUNT[@SEED], such as pile:7b@1"
            )
        if re.search(r"[/\\.~]", name):
            raise UserError(f"there is no corpus at {name!r}; give a file, a folder or one of: {', '.join(CORPORA)}")
        raise UserError(f"there is no corpus named {name!r}, nor a file or folder{did_you_mean(name, CORPORA)}")
    return CORPORA[name]()


def list_corpora() -> list[str]:
    """The names of the built-in corpora."""
    return list(CORPORA)


def describe(name: str) -> dict[str, Any]:
    """What is known of a corpus without reading it: name, unit, note; by split its source and whether it is here."""
    corpus = open_corpus(name)
    splits = {
        split: {"source": corpus.source(split), "local": corpus.fingerprint(split) is not None}
        for split in corpus.splits
    }
    return {"name": corpus.name, "unit": corpus.unit, "note": corpus.note, "splits": splits}
