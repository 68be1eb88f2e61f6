"""Experiments and benchmarks around Rodimus*, and the efficient sequence models beside it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rodimus_lab.nn.zoo import build_model, model_config

__version__ = "0.1.0"
__all__ = ["build_model", "model_config"]


def __getattr__(name: str) -> Any:
    # Records and reports are read without torch, so models are imported when first asked for.
    if name in __all__:
        return getattr(import_module("rodimus_lab.nn.zoo"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
