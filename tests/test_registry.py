"""Names -> things, and the loading of what registers itself."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from rodimus_lab.errors import UserError
from rodimus_lab.registry import PLUGIN_PACKAGES, Registry, load_plugins


@pytest.fixture
def tools() -> Registry[str]:
    registry: Registry[str] = Registry("tool")
    registry.register("saw")("a saw")
    registry.register("hammer", aliases=("mallet", "club"))("a hammer")
    return registry


def test_things_are_found_by_name_and_by_alias(tools: Registry[str]) -> None:
    assert (tools["saw"], tools["mallet"]) == ("a saw", "a hammer")
    assert list(tools) == ["hammer", "saw"]
    assert tools.canonical("club") == "hammer"
    assert tools.aliases("hammer") == ["club", "mallet"]
    assert "club" in tools
    assert "drill" not in tools


def test_register_hands_its_thing_back(tools: Registry[Any]) -> None:
    @tools.register("drill")
    def drill() -> str:
        return "a drill"

    assert drill() == tools["drill"]() == "a drill"


def test_an_unknown_name_is_answered_with_the_known_ones(tools: Registry[str]) -> None:
    with pytest.raises(UserError, match=r"there is no tool named 'hamer'; did you mean 'hammer'\? known: hammer, saw"):
        tools["hamer"]


@pytest.mark.parametrize(("name", "aliases"), [("saw", ()), ("mallet", ()), ("axe", ("saw",)), ("axe", ("club",))])
def test_a_name_is_entered_once(tools: Registry[str], name: str, aliases: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="two tools are named"):
        tools.register(name, aliases=aliases)("another")
    assert list(tools) == ["hammer", "saw"]


def test_load_plugins_imports_every_module() -> None:
    load_plugins()
    root = Path(__file__).parents[1]
    for package in PLUGIN_PACKAGES:
        for path in (root / package.replace(".", "/")).glob("*.py"):
            if path.stem != "__init__":
                assert f"{package}.{path.stem}" in sys.modules


@pytest.mark.parametrize("package", ["baselines", "experiments"])
def test_a_shadowed_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another installed package of the same name stands first on the path."""
    shadow = tmp_path / package
    shadow.mkdir()
    (shadow / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    # An editable installation finds its packages before the path is searched, so look as an ordinary one would.
    finders = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    monkeypatch.setattr(sys, "meta_path", finders)
    with pytest.raises(UserError, match=f"the package '{package}' was found at .*{shadow.name}, not in this project"):
        load_plugins.__wrapped__()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without_evals(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name == "evals" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_evals)
    with pytest.raises(UserError, match="the package 'evals' was found at nowhere"):
        load_plugins.__wrapped__()
