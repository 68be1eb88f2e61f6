"""Commands of the command line that a module outside the library brings along.

A function decorated with `@command(name)` has the parameters that typer reads; its docstring is the command's help.
"""

from __future__ import annotations

from collections.abc import Callable

from rodimus_lab.registry import Registry

COMMANDS: Registry[Callable[..., None]] = Registry("command")
command = COMMANDS.register
