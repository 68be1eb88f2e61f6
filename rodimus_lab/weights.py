"""Weights on disk: `model.safetensors` beside the `recipe.json` that says what they belong to."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rodimus_lab.config import nearest
from rodimus_lab.errors import UserError
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import NAME, PROJECT_ROOT, RECORD, canonical_json, runs_root, write_atomic

MODEL, RECIPE, FINAL = "model.safetensors", "recipe.json", "final"


def checkpoints_root() -> Path:
    """`$RODIMUS_LAB_CHECKPOINTS`, or `checkpoints` under the project's root."""
    chosen = os.environ.get("RODIMUS_LAB_CHECKPOINTS")
    return Path(chosen).expanduser() if chosen else PROJECT_ROOT / "checkpoints"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; its metadata are a checksum of its tensors unless others are given.

    More than one entry would stand in another order every time. Raises `UserError` where the disk refuses.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # As the umask has it; safetensors would leave the owner's alone.
        save_file(tensors, temporary, metadata=dict(metadata or {"sha256": checksum(tensors)}))
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); free the disk or choose another place") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The inverse of `write_tensors`. Raises `SafetensorError` where the file is not what was written."""
    with safe_open(path, framework="pt") as file:
        expected = (file.metadata() or {}).get("sha256")
    tensors = load_file(path)
    if expected not in (None, checksum(tensors)):
        raise SafetensorError("it does not match its checksum")
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of contiguous CPU tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(directory: Path, weights: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Write the weights (a `LanguageModel.state_dict()` of whole tensors) and the recipe into `directory`."""
    write_tensors(directory / MODEL, weights)
    write_atomic(directory / RECIPE, canonical_json(recipe.to_dict()))


def find_model(run: str | Path, root: Path | str | None = None) -> Path:
    """The folder with a run's weights: `run` itself, its `final/`, or `<root>/<experiment>/<run>/final` for a run id.

    Raises `UserError` where there is none, or where two experiments have a run of that id.
    """
    base = checkpoints_root() if root is None else Path(root)
    places = [Path(run), Path(run) / FINAL]
    if isinstance(run, str) and NAME.fullmatch(run):
        places += sorted(base.glob(f"*/{run}/{FINAL}"))
    elif isinstance(run, str) and all(NAME.fullmatch(part) for part in run.split("/")):
        places.append(base / run / FINAL)
    found = [place for place in places if (place / MODEL).is_file()]
    if not found:
        if isinstance(run, str) and NAME.fullmatch(run) and any(runs_root().glob(f"*/{run}/{RECORD}")):
            raise UserError(
                f"{run!r} has a record, but no weights under {base}, as committed runs have none; to train it again, "
                "set RODIMUS_LAB_RESULTS to another folder, such as ~/my-results/runs"
            )
        if (isinstance(run, Path) or "/" in run) and not Path(run).is_dir():
            raise UserError(
                f"there is no checkpoint directory {str(run)!r}, nor a run of that name under {base}; correct the path"
            )
        near = nearest(str(run), [place.parent.parent.name for place in base.glob(f"*/*/{FINAL}/{MODEL}")])
        mend = near or "; train the run first"
        raise UserError(f"no weights of {str(run)!r} are in that folder or under {base}{mend}")
    if len(found) > 1:
        raise UserError(f"{str(run)!r} is ambiguous: {', '.join(map(str, found))}; give one of these folders")
    return found[0]


def read_run(directory: Path) -> tuple[Recipe, dict[str, Tensor]]:
    """The recipe and the weights in a folder that `save_model` wrote. Raises `UserError` where one is damaged."""
    recipe = Recipe.read(directory / RECIPE)
    try:
        return recipe, read_tensors(directory / MODEL)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{directory / MODEL} is damaged ({reason}); train the run again") from None
