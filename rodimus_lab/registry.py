"""Names -> things, and the loading of every module that registers any."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

from rodimus_lab.config import did_you_mean
from rodimus_lab.errors import UserError

PLUGIN_PACKAGES = ("rodimus_lab.nn", "rodimus_lab.data", "baselines", "evals", "experiments")


def file_spelling(name: str) -> str:
    """`name` as it stands in ids and file names: rodimus+ -> rodimus_plus, transformer++ -> transformer_pp."""
    return name.replace("++", "_pp").replace("+", "_plus")


def plain_spelling(name: str) -> str:
    """The inverse of `file_spelling`."""
    return name.replace("_pp", "++").replace("_plus", "+")


T = TypeVar("T")
U = TypeVar("U")


class Registry(Generic[T]):
    """A table of named things of one sort; `aliases` are other spellings of a name."""

    def __init__(self, sort: str):
        self.sort = sort
        self._things: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[U], U]:
        """Decorator that enters a thing under `name`. A name may be entered once."""

        def enter(thing: U) -> U:
            for key in (name, *aliases):
                if key in self._things or key in self._aliases:
                    raise ValueError(f"two {self.sort}s are named {key!r}")
            self._things[name] = thing  # type: ignore[assignment]
            self._aliases.update(dict.fromkeys(aliases, name))
            return thing

        return enter

    def canonical(self, name: str) -> str:
        """The registered spelling of `name`. Raises `UserError` listing the known names."""
        name = self._aliases.get(name, name)
        if name not in self._things:
            raise UserError(f"there is no {self.sort} named {name!r}{did_you_mean(name, self._things)}")
        return name

    def __getitem__(self, name: str) -> T:
        return self._things[self.canonical(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._things))

    def __contains__(self, name: str) -> bool:
        return name in self._things or name in self._aliases

    def aliases(self, name: str) -> list[str]:
        return sorted(alias for alias, target in self._aliases.items() if target == name)


@cache
def load_plugins() -> None:
    """Import every module of the packages that register things.

    Raises `UserError` where another installed package shadows one of the project's own top-level packages.
    """
    root = Path(__file__).resolve().parent.parent
    for package in PLUGIN_PACKAGES:
        spec = importlib.util.find_spec(package)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        expected = root / package.replace(".", "/")
        if expected not in places:
            found = places[0] if places else "nowhere"
            raise UserError(
                f"the package {package!r} was found at {found}, not in this project; "
                "uninstall or rename what shadows it"
            )
        for module in pkgutil.iter_modules([str(expected)], prefix=f"{package}."):
            importlib.import_module(module.name)
