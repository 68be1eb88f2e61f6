"""What is evaluated: a run, a checkpoint directory, or a model that transformers reads, from the Hub or a folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from lm_eval.api.model import TemplateLM

from rodimus_lab.convert import Checkpoint, find_directory, layout_of, open_directory
from rodimus_lab.convert.directory import CONFIG
from rodimus_lab.convert.provenance import Provenance, label_of, of_folder, provenance
from rodimus_lab.convert.tensors import read_json
from rodimus_lab.data.hub import quiet_hub
from rodimus_lab.device import device_type
from rodimus_lab.errors import UserError
from rodimus_lab.records import PUBLISHED, UNTRAINED

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Of these a prompt's left padding is masked out; the states of recurrent models may take it in.
MASK_PADDING = {"bloom", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "opt", "phi", "qwen2", "qwen3"}
ATTENTION_BATCH = 8
# Layouts that transformers and fla have in common.
SHARED = {"bitnet": "BitNetConfig", "mamba": "MambaConfig", "mamba2": "Mamba2Config"}


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


def find_subject(name: str, options: LoadOptions, *, fresh: bool = False) -> Subject:
    """The model of a run id, `experiment/id`, directory or Hub name; `fresh`, the same with weights drawn from seed 0.

    Raises `UserError` where there is none.
    """
    try:
        directory = find_directory(name)
        ours = _is_ours(directory)
    except UserError:
        if not HUB_NAME.fullmatch(name) or Path(name).exists():
            raise
        ours = False
    if ours:
        return _own_model(directory, options, fresh)
    if fresh:
        raise UserError(f"fresh weights are drawn for models of this project, which {name} is not; leave it out")
    return _transformers_model(name, options)


def _is_ours(directory: Path) -> bool:
    """Whether this project reads it; what transformers shares with fla is left to transformers."""
    try:
        layout = layout_of(directory)
    except UserError:
        return False
    return layout != "fla" or read_json(directory / CONFIG)["model_type"] not in SHARED


def _own_model(directory: Path, options: LoadOptions, fresh: bool) -> Subject:
    checkpoint = open_directory(directory)
    origin = provenance(checkpoint)
    if fresh:
        checkpoint, origin = _drawn(checkpoint, origin)
    tokenizer, recipe = checkpoint.tokenizer(), checkpoint.recipe

    def load() -> TemplateLM:
        from evals.lmeval.adapter import RodimusLabLM

        return RodimusLabLM(
            checkpoint,
            tokenizer,
            batch_size=options.batch_size,
            device=options.device,
            dtype=options.dtype,
            max_length=options.max_length,
        )

    facts: dict[str, float] = {"params": checkpoint.config.num_params()}
    if recipe is not None and not fresh:
        facts["trained_tokens"] = recipe.budget.steps * recipe.budget.batch_size * recipe.data.seq_len
    return _subject(origin, load, tokenizer.name, facts)


def _drawn(checkpoint: Checkpoint, origin: Provenance) -> tuple[Checkpoint, Provenance]:
    """The same model before any training: what chance scores on the same items."""
    torch.manual_seed(0)
    tensors = checkpoint.config.build().state_dict()
    identity = {"source": "fresh weights, seed 0", "name": origin.identity["name"]}
    budget = {"name": "untrained", "steps": 0}
    return checkpoint._replace(tensors=tensors), Provenance(origin.label, identity, UNTRAINED, budget)


def _subject(
    origin: Provenance, load: Callable[[], TemplateLM], tokenizer: str = "", facts: dict[str, float] | None = None
) -> Subject:
    return Subject(**origin._asdict(), tokenizer=tokenizer, facts=facts or {}, load=load)


def _transformers_model(name: str, options: LoadOptions) -> Subject:
    config = _transformers_config(name, options)
    revision = getattr(config, "_commit_hash", None)

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

    if Path(name).is_dir():
        return _subject(of_folder(Path(name)), load)
    return Subject(
        label=label_of(name.rpartition("/")[2]),
        identity={"source": "hub", "name": name, "revision": revision or "unknown"},
        corpus=PUBLISHED,
        tokenizer="",
        budget={"name": "published", "steps": 0},
        facts={},
        load=load,
    )


def _transformers_config(name: str, options: LoadOptions) -> Any:
    try:
        try:
            return _read_config(name, options)
        except ValueError:
            if find_spec("fla") is None:
                raise
            import_module("fla.models")  # Makes its model types known to transformers.
            return _read_config(name, options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{name!r} is no run of this project, and transformers cannot read it ({_first_line(error)}); "
            "check the name and the access to the Hub"
        ) from None


def _read_config(name: str, options: LoadOptions) -> Any:
    quiet_hub()
    for shared, own in SHARED.items():  # fla, once imported, has its classes in these places.
        transformers.AutoConfig.register(shared, getattr(transformers, own), exist_ok=True)
    return transformers.AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
