"""Commands of the command line that a module outside the library brings along: evaluators and the like.

A function decorated with `@command(name, panel=...)` has the parameters that typer reads; its docstring is the
command's help. It imports what only it needs when it is called, and leaves results as run records.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

from rodimus_lab.errors import UserError
from rodimus_lab.registry import Registry

F = TypeVar("F", bound=Callable[..., None])


class Command(NamedTuple):
    """`panel` is the heading under which `--help` lists it."""

    run: Callable[..., None]
    panel: str


COMMANDS: Registry[Command] = Registry("command")


def command(name: str, *, panel: str) -> Callable[[F], F]:
    """Register a command under `name`."""

    def register(run: F) -> F:
        COMMANDS.register(name)(Command(run, panel))
        return run

    return register


def require_packages(extra: str, *packages: str) -> None:
    """Raise `UserError` naming the first of these packages, all of one extra, that is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"the package {package} is not installed; run: pip install -e '.[{extra}]'")
