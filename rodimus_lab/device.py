"""Which device models run on."""

from __future__ import annotations

import torch

from rodimus_lab.errors import UserError


def device_type(asked: str | None = None) -> str:
    """cpu or cuda, by default cuda where there is one. Raises `UserError` for another, or where there is no GPU."""
    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"{name!r} is not a device that models run on; choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is visible; install its driver or choose the device cpu")
    return name


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
