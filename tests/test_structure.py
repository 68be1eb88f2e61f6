"""The shape of the house: floors, no circles, nothing defined in `__init__.py`, no overgrown file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rodimus_lab", "baselines", "evals", "experiments")
FLOORS = {
    1: {"errors", "config", "registry", "device", "terminal", "ops"},
    2: {"nn", "data", "records"},
    3: {
        "baselines",
        "recipe",
        "sampling",
        "decoder",
        "generate",
        "scoring",
        "weights",
        "gates",
        "accounting",
        "convert",
        "hf",
        "report",
        "results",
    },
    4: {"experiment", "command", "settings", "variant", "plan", "run_models", "evals", "doctor"},
    5: {"experiments", "train", "sweep", "bench", "site", "checkpoint_commands", "report_commands", "runs_commands"},
    6: {"cli"},
}
LONGEST_FILE = 450


def modules() -> dict[str, Path]:
    """Every module of the four packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
SOURCES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str) -> Iterator[str]:
    """The project's modules that a module imports, wherever in the file, by statement or by a literal name."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(SOURCES[name]):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).rstrip(".")
            targets = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                targets = [str(node.args[0].value)]
        for target in targets:
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            if target and target != name:
                yield target


def room(module: str) -> str:
    """The part of the house that a module lies in; the library's own front door is `rodimus_lab`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "rodimus_lab" and len(parts) > 1 else parts[0]


def floor(name: str) -> int:
    found = [number for number, rooms in FLOORS.items() if name in rooms]
    assert found, f"{name} stands on no floor: give it one in {Path(__file__).name}"
    return found[0]


ARROWS = {name: sorted(set(imports(name))) for name in MODULES}


def test_imports_are_found() -> None:
    """The reading of imports itself: absolute, through a package, and inside a function."""
    assert "rodimus_lab.config" in ARROWS["rodimus_lab.registry"]
    assert "rodimus_lab.ops.segments" in ARROWS["rodimus_lab.ops"]
    assert "rodimus_lab.nn.zoo" in ARROWS["baselines.transformer"]
    assert len(ARROWS) > 30


def test_imports_go_down_only() -> None:
    upward = []
    for name, targets in ARROWS.items():
        here = 2 if room(name) == "rodimus_lab" else floor(room(name))
        upward += [f"{name} -> {target}" for target in targets if floor(room(target)) > here]
    assert not upward


@pytest.mark.parametrize("by_room", [True, False])
def test_no_circles(by_room: bool) -> None:
    graph: dict[str, set[str]] = {}
    for name, targets in ARROWS.items():
        for target in targets:
            if not by_room:
                graph.setdefault(name, set()).add(target)
            elif room(name) != room(target):
                graph.setdefault(room(name), set()).add(room(target))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_library_names_no_module_outside_itself() -> None:
    outward = [
        f"{name} -> {target}"
        for name, targets in ARROWS.items()
        for target in targets
        if name.startswith("rodimus_lab") and not target.startswith("rodimus_lab")
    ]
    assert not outward


def test_experiments_do_not_import_one_another() -> None:
    across = [
        f"{name} -> {target}"
        for name, targets in ARROWS.items()
        for target in targets
        if room(name) == room(target) == "experiments"
    ]
    assert not across


def test_init_files_only_hand_names_on() -> None:
    offences = []
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            continue
        for index, node in enumerate(SOURCES[name].body):
            docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            names = isinstance(node, ast.Assign) and {getattr(t, "id", "") for t in node.targets} <= {
                "__all__",
                "__version__",
            }
            lazily = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            if not (docstring or names or lazily or for_types or isinstance(node, ast.Import | ast.ImportFrom)):
                offences.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not offences


def test_no_file_is_overgrown() -> None:
    """Kernels aside, a file past this length is two files."""
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {n: length for n, length in lengths.items() if length > LONGEST_FILE and "triton" not in n}


def test_no_room_for_odds_and_ends() -> None:
    assert not [name for name in MODULES if name.rpartition(".")[2] in ("utils", "util", "helpers", "common", "misc")]


def test_file_names_in_the_tests_are_unique() -> None:
    """Test folders are no packages, so pytest tells their modules apart by the file's name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))
