"""Whether an optional package is there; loads nothing of it."""

from __future__ import annotations

import importlib.util

from rodimus_lab.ops.tracing import constant


@constant
def installed(package: str) -> bool:
    """A constant to torch.compile, older versions of which would cut a block in two where it is asked."""
    return importlib.util.find_spec(package) is not None
