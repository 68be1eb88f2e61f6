"""Evaluators, registered by name: each is a command of the CLI.

A file of `evals/` holds one evaluator. A function decorated with `@evaluator` has typer's annotated parameters, scores
models that exist already, and leaves its results as run records; it imports what only it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rodimus_lab.registry import Registry

EVALUATORS: Registry[Callable[..., None]] = Registry("evaluator")
F = TypeVar("F", bound=Callable[..., None])


def evaluator(name: str) -> Callable[[F], F]:
    """Register a command under `name`."""
    return EVALUATORS.register(name)
