"""Where weights come from, as the records of what they scored say it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from rodimus_lab.convert.directory import Checkpoint
from rodimus_lab.errors import UserError
from rodimus_lab.records import FROM_FOLDER
from rodimus_lab.weights import MODEL


class Provenance(NamedTuple):
    """A model's name in results, what identifies its weights, and its training: corpus and budget."""

    label: str
    identity: dict[str, str]
    corpus: str
    budget: dict[str, Any]


def provenance(checkpoint: Checkpoint) -> Provenance:
    """Of a run, what its recipe says; of a directory, see `of_folder`. Raises `UserError` where a file is damaged."""
    recipe = checkpoint.recipe
    if recipe is None:
        return of_folder(checkpoint.directory)
    weights = _noted_digest(checkpoint.directory / MODEL)
    return Provenance(
        label=recipe.label,
        identity={"source": "run", "name": f"{recipe.experiment}/{recipe.id}", "weights": weights},
        corpus=recipe.data.corpus,
        budget=recipe.budget.to_dict(),
    )


def of_folder(folder: Path) -> Provenance:
    """What a folder says of itself, which is not what its model was trained on."""
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    name = folder.resolve().name
    return Provenance(
        label=label_of(name),
        identity={"source": "folder", "name": name, "weights": " ".join(_digest(path) for path in weights)},
        corpus=FROM_FOLDER,
        budget={"name": "training not known", "steps": 0},
    )


def label_of(name: str) -> str:
    """A name as labels and file names have it."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower())


def _noted_digest(path: Path) -> str:
    """What `write_tensors` noted of the tensors; of another program's file, a hash of it."""
    try:
        with safe_open(path, framework="pt") as file:
            known = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); train the run again") from None
    return known[:16] if known else _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
