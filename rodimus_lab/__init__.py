"""Experiments and benchmarks around Rodimus*, and the efficient sequence models beside it."""

from rodimus_lab.nn.zoo import build_model, model_config

__version__ = "0.1.0"
__all__ = ["build_model", "model_config"]
