"""Whether Triton can run; loads nothing of it."""

from __future__ import annotations

import os

from rodimus_lab.ops.installed import installed


def why_no_triton(device: str) -> str | None:
    """Why no Triton kernel can run on a device type, or None if it can."""
    if not installed("triton"):
        return "triton is not installed (pip install -e '.[kernels]')"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a CUDA device (or TRITON_INTERPRET=1, which is for tests)"
    return None
