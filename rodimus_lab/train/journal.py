"""What the main rank writes down while a run goes on, and the record at its end."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rodimus_lab.device import device_name
from rodimus_lab.errors import UserError
from rodimus_lab.train.distributed import World

TIMING = "timing.jsonl"
SIGNIFICANT = 8


def rounded(values: Mapping[str, float | int]) -> dict[str, float | int]:
    """Floats with as many digits as float32 has meaning for."""
    return {k: float(f"{v:.{SIGNIFICANT}g}") if isinstance(v, float) else v for k, v in values.items()}


class Timing:
    """Tokens a second of each window, over all sessions of a run. They are beside the checkpoints: a run's metrics hold
    nothing that differs from one machine to another."""

    def __init__(self, folder: Path):
        self.path = folder / TIMING

    def append(self, step: int, rate: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "tokens_per_second": round(rate, 1)}) + "\n")

    def rates(self) -> list[float]:
        if not self.path.exists():
            return []
        *lines, _torn = self.path.read_text(errors="replace").split("\n")
        rates = []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # One that broke off, and the one behind it.
                rates.append(float(json.loads(line)["tokens_per_second"]))
        return rates


class Board:
    """TensorBoard event files in `folder`, or nothing where it is None."""

    def __init__(self, folder: Path | None, from_step: int = 0):
        self._writer = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("tensorboard is not installed; pip install -e '.[train]' or leave it out") from None
            self._writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def add(self, values: Mapping[str, float | int]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                if name != "step":
                    self._writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def device_facts(world: World) -> dict[str, Any]:
    """The devices of the run, for its environment."""
    facts = {"device": device_label(world), "world_size": world.size, "cuda": torch.version.cuda}
    return facts | ({"driver": _driver()} if world.device.type == "cuda" else {})


def device_label(world: World) -> str:
    name = device_name(world.device)
    return name if world.size == 1 else f"{world.size} x {name}"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()
