"""Runs, and checkpoint directories of any layout, opened as this project's models, and written in its own layout.

The own layout is what `save_pretrained` of `rodimus_lab.hf` writes: `config.json` with the model under
`language_model`, safetensors whose names begin with `lm.`, and the tokenizer's files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tokenizers as backends
import torch
from torch import Tensor

from rodimus_lab.convert import fla, official
from rodimus_lab.convert.chat import CHAT_TEMPLATE
from rodimus_lab.convert.settings import Settings
from rodimus_lab.convert.tensors import Source, dtype_name, read_json, write_sharded
from rodimus_lab.data import Tokenizer, load_tokenizer, read_backend
from rodimus_lab.errors import UserError
from rodimus_lab.nn.mixer import TokenMixer
from rodimus_lab.nn.model import LanguageModel, LanguageModelConfig
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import write_atomic
from rodimus_lab.registry import load_plugins
from rodimus_lab.weights import FINAL, RECIPE, find_model, read_run

Layout = Literal["native", "official", "fla", "run"]
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
NATIVE, PREFIX = "rodimus_lab", "lm."
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "cls_token": "[CLS]", "gmask_token": "[gMASK]"}


class Checkpoint(NamedTuple):
    """A model, the tensors of its `state_dict()`, the directory it is from and the ids of its special tokens; of a run
    its recipe."""

    config: LanguageModelConfig
    tensors: dict[str, Tensor]
    directory: Path
    layout: Layout
    ids: dict[str, Any]
    recipe: Recipe | None = None

    def build(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
        """The model in evaluation mode, in the checkpoint's dtype unless told otherwise."""
        with torch.device("meta"):
            model = self.config.build()
        _check(model, self.tensors, self.directory)
        model.load_state_dict(self.tensors, assign=True)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
            if isinstance(module, TokenMixer):
                module.reset_buffers()
        dtype = dtype or getattr(torch, dtype_name(self.tensors))
        return model.to(device=device, dtype=dtype).eval()

    def tokenizer(self) -> Tokenizer:
        """The directory's own, or the one that the run was trained with. Raises `UserError` where there is none."""
        if self.recipe is not None:
            if not self.recipe.reads_text:
                raise UserError(f"{self.recipe.id} was not trained on text and has no tokenizer; give another run")
            return load_tokenizer(self.recipe.data.tokenizer)
        if not (self.directory / TOKENIZER).is_file():
            raise UserError(f"{self.directory} has no {TOKENIZER}; copy the model's tokenizer there")
        return load_tokenizer(str(self.directory / TOKENIZER))


class ChatTokenizer:
    """Text in which special tokens are spelled out, to ids: what the chat format's prompts are."""

    def __init__(self, tokenizer: Tokenizer):
        self._backend = backends.Tokenizer.from_str(tokenizer.to_json())
        self._backend.encode_special_tokens = False

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def layout_of(directory: Path) -> Layout:
    """Whose layout a directory has. Raises `UserError` where it has none that is known."""
    if (directory / RECIPE).is_file():
        return "run"
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory} has neither {CONFIG} nor {RECIPE}; give a checkpoint directory or a run's folder")
    values = read_json(directory / CONFIG)
    kind = values.get("model_type")
    if kind == NATIVE:
        return "native"
    if kind == "rodimus" and "d_model" in values:
        return "official"
    if kind in fla.families():
        return "fla"
    raise UserError(
        f"model_type {kind!r} in {directory / CONFIG} is no layout that is known: {NATIVE}, official or fla"
    )


def find_directory(name: str | Path) -> Path:
    """The checkpoint directory of that path, or a run's folder of weights, by its id as well; see `find_model`."""
    folder = Path(name)
    if folder.is_dir() and not (folder / FINAL / RECIPE).is_file():
        return folder
    return find_model(name)


def open_checkpoint(name: str | Path, layout: Layout | None = None) -> Checkpoint:
    """A run by its id, `experiment/id` or folder, or a checkpoint directory; see `open_directory`."""
    return open_directory(find_directory(name), layout)


def open_directory(directory: Path, layout: Layout | None = None) -> Checkpoint:
    """The checkpoint in a directory, of that layout or of whichever it is.

    Raises `UserError` naming the key, tensor or shape that does not fit, or that this project cannot express.
    """
    load_plugins()
    found = layout_of(directory)
    if layout is not None and layout != found:
        raise UserError(f"{directory} has the layout {found}, not {layout}; choose that")
    if found == "run":
        recipe, tensors = read_run(directory)
        return Checkpoint(recipe.model, tensors, directory, found, {}, recipe)
    settings = Settings(read_json(directory / CONFIG), str(directory / CONFIG))
    source = Source(directory)
    if found == "official":
        config = official.read_config(settings)
        tensors = official.read_tensors(source, settings, config)
    elif found == "fla":
        config, tensors = fla.read(source, settings)
    else:
        config = LanguageModelConfig.from_dict(settings.part("language_model").values)
        tensors = _own_tensors(source, config)
    return Checkpoint(config, tensors, directory, found, _ids(settings))


def _ids(settings: Settings) -> dict[str, Any]:
    return {key: settings.values[key] for key in IDS if settings.values.get(key) is not None}


def _own_tensors(source: Source, config: LanguageModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = config.build().state_dict()
    tensors = {name: source.take(PREFIX + name, tensor.shape) for name, tensor in expected.items()}
    source.finish()
    return tensors


def _check(model: LanguageModel, tensors: dict[str, Tensor], directory: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(f"{name} of {directory} is {found.get(name)}, not {expected.get(name)}")


def write_native(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint in this project's layout, its config last. Raises `UserError` where the disk refuses."""
    tensors = {PREFIX + name: tensor for name, tensor in checkpoint.tensors.items()}
    values = {
        "architectures": ["RodimusLabForCausalLM"],
        "model_type": NATIVE,
        "language_model": checkpoint.config.to_dict(),
        "dtype": dtype_name(tensors),
        "tie_word_embeddings": False,
        **_special_ids(checkpoint),
    }
    with torch.device("meta"):
        _check(checkpoint.config.build(), checkpoint.tensors, checkpoint.directory)
    _write(checkpoint, directory, values, tensors, "RodimusLabTokenizer")


def write_official(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a Rodimus or Rodimus+ in the authors' layout, its config last.

    Raises `UserError` naming what that layout cannot hold.
    """
    values, tensors = official.to_official(checkpoint.config, checkpoint.tensors, _special_ids(checkpoint))
    _write(checkpoint, directory, values, tensors, "RodimusTokenizer")


def _write(
    checkpoint: Checkpoint, directory: Path, values: dict[str, Any], tensors: dict[str, Tensor], tokenizer_class: str
) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is there already; give a new folder")
    texts = {}
    text = _tokenizer_text(checkpoint)
    if text is not None:
        facts = _tokenizer_facts(checkpoint) | {"tokenizer_class": tokenizer_class}
        texts = {TOKENIZER: text, "tokenizer_config.json": json.dumps(facts, indent=1, ensure_ascii=False)}
    texts[CONFIG] = json.dumps(values, indent=1)
    try:
        write_sharded(directory, tensors)
        for name, text in texts.items():
            write_atomic(directory / name, text)
    except BaseException:  # What is left of a folder that was new or empty would be in the way of the next attempt.
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _special_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.recipe is None or not checkpoint.recipe.reads_text:
        return checkpoint.ids
    return dict.fromkeys(IDS[1:], checkpoint.tokenizer().eos_id)


def _tokenizer_text(checkpoint: Checkpoint) -> str | None:
    """What `tokenizer.json` says; None where a directory has none and for a run that did not read text.

    Raises `UserError` where it is no tokenizer.
    """
    if checkpoint.recipe is not None:
        return checkpoint.tokenizer().to_json() if checkpoint.recipe.reads_text else None
    path = checkpoint.directory / TOKENIZER
    if not path.is_file():
        return None
    read_backend(path)
    return path.read_text(encoding="utf-8")


def _tokenizer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What transformers has to know beside `tokenizer.json`; the chat format where the source is the authors'."""
    path = checkpoint.directory / "tokenizer_config.json"
    before = read_json(path) if path.is_file() else {}
    facts: dict[str, Any] = {
        key: before[key] for key in ("bos_token", "eos_token", "pad_token", "chat_template") if key in before
    }
    if checkpoint.layout == "official":
        backend = backends.Tokenizer.from_str(checkpoint.tokenizer().to_json())
        facts = {key: token for key, token in SPECIAL.items() if backend.token_to_id(token) is not None} | facts
        facts["chat_template"] = CHAT_TEMPLATE
    if "eos_token" not in facts:
        tokenizer = checkpoint.tokenizer()
        facts["eos_token"] = tokenizer.token(tokenizer.eos_id)
    return {"padding_side": "left", "pad_token": facts["eos_token"]} | facts
