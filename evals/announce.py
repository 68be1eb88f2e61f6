"""`python -m lm_eval --model rodimus-lab`: lm-eval is told of the model when it starts.

lm-eval 0.4.13 asks no other package for models, so a line in a `.pth` file of site-packages, which every start of
Python reads, puts a finder in front: when lm-eval's models are imported, ours joins their registry, and where a user
can mend what is wrong, lm-eval's command line ends in one sentence. Nothing is imported before. `python -m
evals.announce` writes that file into the environment it runs in.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

MODELS, COMMAND_LINE = "lm_eval.models", "lm_eval._cli.harness"
NAME, TARGET = "rodimus-lab", "evals.lmeval.adapter:RodimusLabLM"
PTH = "rodimus_lab_lm_eval.pth"
LINE = 'import sys; exec("try:\\n    import evals.announce as a\\n    a.listen()\\nexcept ImportError:\\n    pass")\n'


def register(_models: ModuleType) -> None:
    """Put our model into lm-eval's registry."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def end_in_a_sentence(command_line: ModuleType) -> None:
    """From now on a `UserError` ends lm-eval's command line as it ends this project's: a sentence, and its code."""
    execute = command_line.HarnessCLI.execute

    def in_a_sentence(self: Any, args: Any) -> None:
        try:
            execute(self, args)
        except Exception as error:
            from rodimus_lab.errors import UserError

            if not isinstance(error, UserError):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    command_line.HarnessCLI.execute = in_a_sentence


AFTERWARDS: dict[str, Callable[[ModuleType], None]] = {MODELS: register, COMMAND_LINE: end_in_a_sentence}


class _Loader(Loader):
    """What loads a module of lm-eval, and then does what is to be done with it."""

    def __init__(self, loader: Loader, afterwards: Callable[[ModuleType], None]):
        self._loader, self._afterwards = loader, afterwards

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._afterwards(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in AFTERWARDS else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, AFTERWARDS[name])
        return spec


def listen() -> None:
    """From now on the import of lm-eval's models registers ours, and its command line ends in sentences."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def announce(folder: Path | None = None) -> Path:
    """Write the `.pth` file into `folder`, by default this environment's site-packages."""
    path = (folder or Path(sysconfig.get_path("purelib"))) / PTH
    path.write_text(LINE, encoding="utf-8")
    return path


if __name__ == "__main__":
    print(f"written: {announce()}; python -m lm_eval now knows --model {NAME}")
