"""The tensors of a checkpoint directory: one safetensors file or several with an index, read as they are asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.records import write_atomic
from rodimus_lab.weights import MODEL, write_tensors

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
FORMAT = {"format": "pt"}  # transformers reads no file that has metadata without it.


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` naming the file."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
        raise UserError(f"cannot read {path} ({reason}); give a checkpoint directory") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; give a checkpoint directory")
    return values


class Source:
    """The tensors in a directory. What is taken is ticked off, so that `finish` can name what is left over.

    Only safetensors are read. Raises `UserError` naming the file, the tensor or the shape that is wrong.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / INDEX
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                raise UserError(f"{index} has no weight_map; fetch it again")
            if strays := [name for name in files.values() if Path(name).name != name]:
                raise UserError(f"{index} points out of its folder ({strays[0]}); fetch it again")
        elif (directory / MODEL).is_file():
            files = dict.fromkeys(self._names(directory / MODEL), MODEL)
        else:
            pickled = next(iter(sorted(directory.glob("*.bin"))), None)
            mend = f", and {pickled.name} is a pickle, which is not read; save it as safetensors" if pickled else ""
            raise UserError(f"{directory} has no {MODEL} nor {INDEX}{mend or '; copy the weights there'}")
        self._files: dict[str, str] = files
        self._left = set(files)
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def _names(self, path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from None

    def take(self, name: str, shape: Iterable[int] | None = None) -> Tensor:
        """The tensor of that name, which must have that shape."""
        if name not in self._files:
            raise UserError(f"{self.directory} has no tensor {name!r}, which its config calls for")
        path = self.directory / self._files[name]
        try:
            if path.name not in self._open:
                self._open[path.name] = self._stack.enter_context(safe_open(path, framework="pt"))
            tensor = self._open[path.name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from None
        self._left.discard(name)
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise UserError(
                f"{name!r} in {self.directory} is {_by(tensor.shape)}, not the {_by(shape)} that its config calls for"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{name!r} in {self.directory} holds {tensor.dtype}, not floating-point numbers")
        return tensor

    def finish(self, ignored: str = r"(?!)") -> None:
        """Raises `UserError` naming a tensor that nothing took and whose name `ignored` does not match."""
        left = sorted(name for name in self._left if not re.search(ignored, name))
        self._stack.close()
        self._open.clear()
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UserError(f"{self.directory} has a tensor {left[0]!r}{more} that its config does not call for")


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def write_sharded(directory: Path, tensors: Mapping[str, Tensor], *, limit: int = SHARD_BYTES) -> None:
    """Write tensors as one safetensors file, or as several of at most `limit` bytes and the index that finds them."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(directory / MODEL, shards[0], FORMAT)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, shard, FORMAT)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    write_atomic(directory / INDEX, text)


def dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """The dtype of most of the numbers, as transformers names it."""
    count: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
    return str(max(count, key=lambda dtype: count[dtype])).removeprefix("torch.")
