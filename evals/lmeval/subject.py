"""What is evaluated: a run of this project, or a model that transformers reads, from the Hub or a folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lm_eval.api.model import TemplateLM
from safetensors import SafetensorError, safe_open

from rodimus_lab.device import device_type
from rodimus_lab.errors import UserError
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import PUBLISHED
from rodimus_lab.weights import MODEL, RECIPE, find_model

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Of these a prompt's left padding is masked out; the states of recurrent models may take it in.
MASK_PADDING = {"bloom", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "opt", "phi", "qwen2", "qwen3"}
ATTENTION_BATCH = 8


class LoadOptions(NamedTuple):
    """How a model is run; but for `dtype` and `max_length` none of it decides a score."""

    device: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int | None = None
    max_length: int | None = None
    trust_remote_code: bool = False


class Subject(NamedTuple):
    """A model before it is loaded: its name in results, what identifies its weights, what it was trained on (corpus,
    tokenizer, budget), what else its record says, and how it is loaded."""

    label: str
    identity: dict[str, str]
    corpus: str
    tokenizer: str
    budget: dict[str, Any]
    facts: dict[str, float]
    load: Callable[[], TemplateLM]


def find_subject(name: str, options: LoadOptions) -> Subject:
    """The model of a run id, `experiment/id`, folder or Hub name. Raises `UserError` where there is none."""
    folder = Path(name)
    if (folder / "config.json").is_file() and not (folder / RECIPE).is_file():
        return _transformers_model(name, options)
    try:
        directory = find_model(name)
    except UserError:
        if not HUB_NAME.fullmatch(name) or folder.exists():
            raise
        return _transformers_model(name, options)
    return _run(directory, options)


def _run(directory: Path, options: LoadOptions) -> Subject:
    recipe = Recipe.read(directory / RECIPE)

    def load() -> TemplateLM:
        from evals.lmeval.adapter import RodimusLabLM

        return RodimusLabLM(
            directory,
            batch_size=options.batch_size,
            device=options.device,
            dtype=options.dtype,
            max_length=options.max_length,
        )

    tokens = recipe.budget.steps * recipe.budget.batch_size * recipe.data.seq_len
    return Subject(
        label=recipe.label,
        identity={"source": "run", "name": f"{recipe.experiment}/{recipe.id}", "weights": _checksum(directory / MODEL)},
        corpus=recipe.data.corpus,
        tokenizer=recipe.data.tokenizer,
        budget=recipe.budget.to_dict(),
        facts={"params": recipe.model.num_params(), "trained_tokens": tokens},
        load=load,
    )


def _checksum(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            known = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); train the run again") from None
    return (known or _digest(path))[:16]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _transformers_model(name: str, options: LoadOptions) -> Subject:
    config = _transformers_config(name, options)
    revision = getattr(config, "_commit_hash", None)
    folder = Path(name)
    if folder.is_dir():
        weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
        identity = {
            "source": "folder",
            "name": folder.resolve().name,
            "weights": " ".join(_digest(p)[:16] for p in weights),
        }
    else:
        identity = {"source": "hub", "name": name, "revision": revision or "unknown"}

    def load() -> TemplateLM:
        from lm_eval.models.huggingface import HFLM

        default_batch = ATTENTION_BATCH if config.model_type in MASK_PADDING else 1
        try:
            return HFLM(
                pretrained=name,
                revision=revision or "main",
                dtype=options.dtype,
                device=options.device or device_type(),
                batch_size=options.batch_size or default_batch,
                max_length=options.max_length,
                trust_remote_code=options.trust_remote_code,
            )
        except (OSError, ImportError) as error:
            raise UserError(f"transformers cannot load {name} ({_first_line(error)}); give another model") from None

    return Subject(
        label=re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()),
        identity=identity,
        corpus=PUBLISHED,
        tokenizer="",
        budget={"name": "published", "steps": 0},
        facts={},
        load=load,
    )


def _transformers_config(name: str, options: LoadOptions) -> Any:
    from transformers import AutoConfig

    try:
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
        except ValueError:
            if find_spec("fla") is None:
                raise
            import_module("fla.models")  # Makes its model types known to transformers.
            return AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{name!r} is no run of this project, and transformers cannot read it ({_first_line(error)}); "
            "check the name and the access to the Hub"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
