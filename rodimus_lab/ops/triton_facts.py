"""Whether Triton can run, and how exactly it is to multiply; loads nothing of it."""

from __future__ import annotations

import os

import torch

from rodimus_lab.ops.installed import installed


def why_no_triton(device: str) -> str | None:
    """Why no Triton kernel can run on a device type, or None if it can."""
    if not installed("triton"):
        return "triton is not installed (pip install -e '.[kernels]')"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a CUDA device (or TRITON_INTERPRET=1, which is for tests)"
    return None


def dot_precision(dtype: torch.dtype) -> str:
    """What a kernel's products of float32 are rounded to, in words of `tl.dot`: nearly nothing where its tensors are
    float32 themselves, unless torch's own products of such tensors are rounded to TensorFloat32 too."""
    exact = dtype.itemsize == 4 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"
