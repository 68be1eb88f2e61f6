"""What every test stands on: one thread, one seed, no GPU test without a GPU, and the command line in this process."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sharing import made_once

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # And of the processes that tests start.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first, so that processes which share the tests have short ones left at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # As in a script's background; tests send it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # While thousands of tests are collected, and of what that leaves nothing is searched later.


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` takes a millisecond where there is no GPU.
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


class Result(NamedTuple):
    """What a command line did, as its caller sees it."""

    code: int
    out: str
    err: str


def run_cli(*arguments: object) -> Result:
    """`rodimus-lab ARGUMENTS` in this process, through the entry point."""
    from rodimus_lab.cli import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["rodimus-lab", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    code = end.value.code
    return Result(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def pydoc_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the corpus `pydoc` prepared in tokens of its own."""
    from rodimus_lab.data import prepare

    def make(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RODIMUS_LAB_CACHE", str(root / "cache"))
            prepare("pydoc", "pydoc-4096", workers=1, progress=False)

    return made_once(tmp_path_factory, "pydoc", make) / "cache"


@pytest.fixture
def places(tmp_path: Path, pydoc_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own for `cache/`, `runs/`, `tables/` and `checkpoints/`; pydoc is prepared there."""
    shutil.copytree(pydoc_cache, tmp_path / "cache")
    monkeypatch.setenv("RODIMUS_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RODIMUS_LAB_RESULTS", str(tmp_path / "runs"))
    monkeypatch.setenv("RODIMUS_LAB_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.delenv("RODIMUS_LAB_DATA", raising=False)
    return tmp_path


@pytest.fixture
def texts(places: Path) -> Path:
    """A corpus of three short texts, as a folder."""
    folder = places / "texts"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        text = f"Once more to {split} on the same words, for there is nothing else to learn.\n"
        (folder / f"{split}.txt").write_text(text * 100)
    return folder


class SmokeRun(NamedTuple):
    """A finished `rodimus-lab wikitext103 --steps 4`: what it said, its id and where it left everything."""

    result: Result
    id: str
    root: Path


@pytest.fixture(scope="session")
def finished_smoke_run(tmp_path_factory: pytest.TempPathFactory, pydoc_cache: Path) -> SmokeRun:
    def make(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RODIMUS_LAB_CACHE", str(pydoc_cache))
            patch.setenv("RODIMUS_LAB_RESULTS", str(root / "runs"))
            patch.setenv("RODIMUS_LAB_CHECKPOINTS", str(root / "checkpoints"))
            patch.delenv("RODIMUS_LAB_DATA", raising=False)
            result = run_cli("wikitext103", "--budget", "smoke", "--steps", 4, "--device", "cpu")
        assert result.code == 0, result.err
        (root / "said.json").write_text(json.dumps(result))

    root = made_once(tmp_path_factory, "smoke", make)
    (run,) = (root / "runs" / "wikitext103").iterdir()
    return SmokeRun(Result(*json.loads((root / "said.json").read_text())), run.name, root)


@pytest.fixture
def smoke_run(finished_smoke_run: SmokeRun, places: Path) -> SmokeRun:
    """The finished smoke run, in this test's own places."""
    for name in ("runs", "checkpoints"):
        shutil.copytree(finished_smoke_run.root / name, places / name)
    return finished_smoke_run._replace(root=places)


@pytest.fixture
def cli() -> Callable[..., Result]:
    return run_cli
