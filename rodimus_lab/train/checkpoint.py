"""Checkpoints of a running training, for one process and for many alike.

A checkpoint is a folder `step-<8 digits>`: tensors as safetensors shards (torch.distributed.checkpoint), the random
states of each rank, `state.json`, and `manifest.json` with the SHA-256 of every other file. It is made beside its place
and renamed into it, so it is there whole or not at all; it can be read by another number of ranks than wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from rodimus_lab.errors import UserError
from rodimus_lab.records import canonical_json, write_atomic
from rodimus_lab.train.distributed import World
from rodimus_lab.weights import write_tensors

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors"
STEP = re.compile(r"step-(\d{8})")


class Pending(NamedTuple):
    """A checkpoint that is being written: its step, folder and state as they were, and this rank's part of the work."""

    step: int
    folder: Path
    state: Mapping[str, Any]
    written: Future[Any]


class CheckpointStore:
    """The checkpoints of one run. Every rank calls every method; the main one alone makes and removes folders."""

    def __init__(self, folder: Path, world: World, *, keep_last: int = 2):
        self.folder, self.world, self.keep_last = folder, world, max(1, keep_last)
        self._pending: Pending | None = None
        self._group: Any = None

    def steps(self) -> list[int]:
        """Steps with a checkpoint, damaged ones included, ascending."""
        if not self.folder.is_dir():
            return []
        found = (STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, in_background: bool = False
    ) -> None:
        """Write a checkpoint and remove all but the newest `keep_last` up to `step`.

        `in_background` copies the tensors and returns; the checkpoint is there once `finish` or `settle` has found it
        written, and the one before it until then. Raises `UserError` on every rank where the disk refuses on one;
        nothing of the attempt is left then.
        """
        self.finish()
        temporary = self.folder / f".tmp-step-{step:08d}"
        with self._or_nothing(temporary):
            self._together(lambda: self._clear(temporary), main=True)
            self._together(
                lambda: write_tensors(temporary / f"random-{self.world.rank:05d}.safetensors", _random_state())
            )
            if in_background:
                self._together(lambda: self._begin(step, temporary, tensors, state))
                return
            self._together(lambda: self._write_shards(temporary / TENSORS, tensors))
            self._together(lambda: self._seal(temporary, self.path(step), state), main=True)
        self._remove_old(step)

    def settle(self) -> None:
        """`finish`, where every rank has written its part of what is in the background; else nothing."""
        if self._pending is not None and not self.world.any(not self._pending.written.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for what is written in the background, and put it in its place. Raises as `save` does."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._or_nothing(pending.folder):
            self._together(lambda: pending.written.result() and None)
            self._together(lambda: self._seal(pending.folder, self.path(pending.step), pending.state), main=True)
        self._remove_old(pending.step)

    def _begin(self, step: int, temporary: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        if self._group is None and self.world.size > 1:  # Its own, so as not to meet training's collectives.
            self._group = dist.new_group(backend="gloo")
        # Of tensors on a GPU torch makes the copies; those on the CPU it would write as they are by then.
        copies = {name: tensor.detach().clone() if tensor.is_cpu else tensor for name, tensor in tensors.items()}
        writer = _dcp().HuggingFaceStorageWriter(str(temporary / TENSORS), save_distributed=True)
        written = _dcp().async_save(
            copies, storage_writer=writer, process_group=self._group, no_dist=self.world.size == 1
        )
        assert isinstance(written, Future)
        self._pending = Pending(step, temporary, json.loads(canonical_json(state)), written)

    @contextmanager
    def _or_nothing(self, temporary: Path) -> Iterator[None]:
        try:
            yield
        except UserError:
            if self.world.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _remove_old(self, step: int) -> None:
        if self.world.main:
            for old in [found for found in self.steps() if found <= step][: -self.keep_last]:
                shutil.rmtree(self.path(old))

    def restore(self, tensors: Mapping[str, Tensor], say: Callable[[str], None]) -> dict[str, Any] | None:
        """Read the newest good checkpoint into `tensors`, set the random states, return its state; None without any.

        A damaged checkpoint is named through `say`, and the one before it is taken. Raises `UserError` where all are
        damaged.
        """
        steps = self.steps() if self.world.main else []
        chosen, damages = None, []
        for step in reversed(steps):
            damage = find_damage(self.path(step))
            if damage is None:
                chosen = step
                break
            damages.append(f"the checkpoint {self.path(step)} is damaged ({damage})")
        chosen, damages = self.world.from_main((chosen, damages))
        if chosen is None:
            if damages:
                raise UserError(f"{damages[0]}, and no other is good; delete {self.folder} to start the run again")
            return None
        for damage in damages:
            say(f"{damage}; an earlier one is used instead")
        path = self.path(chosen)
        reader = _dcp().HuggingFaceStorageReader(str(path / TENSORS))
        _dcp().load(dict(tensors), storage_reader=reader, no_dist=self.world.size == 1)
        random = path / f"random-{self.world.rank:05d}.safetensors"
        if random.exists():
            _set_random_state(load_file(random))
        return json.loads((path / STATE).read_bytes())

    def _clear(self, temporary: Path) -> None:
        for leftover in self.folder.glob(".tmp-step-*"):
            shutil.rmtree(leftover)
        (temporary / TENSORS).mkdir(parents=True)

    def _write_shards(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        writer = _dcp().HuggingFaceStorageWriter(str(directory), save_distributed=True)
        _dcp().save(dict(tensors), storage_writer=writer, no_dist=self.world.size == 1)

    def _seal(self, temporary: Path, target: Path, state: Mapping[str, Any]) -> None:
        write_atomic(temporary / STATE, canonical_json(state))
        write_atomic(temporary / MANIFEST, canonical_json(_checksums(temporary)))
        for directory in (temporary / TENSORS, temporary):
            _sync(directory)
        if target.exists():  # A damaged one that this run has come past again.
            shutil.rmtree(target)
        os.rename(temporary, target)
        _sync(self.folder)

    def _together(self, action: Callable[[], None], *, main: bool = False) -> None:
        """Run `action`, on the main rank alone or on all; where it fails on one, all raise."""
        problem = None
        if self.world.main or not main:
            try:
                action()
            except UserError as error:
                problem = str(error)
            except (OSError, _dcp().api.CheckpointException) as error:
                problem = (
                    f"cannot write a checkpoint into {self.folder} ({_reason(error)}); free the disk and resume the run"
                )
        for message in filter(None, self.world.gather(problem)):
            raise UserError(message)


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its files must be those of its manifest, with their checksums."""
    try:
        expected = json.loads((path / MANIFEST).read_bytes())
        if not isinstance(expected, dict) or STATE not in expected:
            return f"{MANIFEST} is not a list of checksums"
        actual = _checksums(path)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"unreadable: {error}"
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{name} is missing"
        if expected.get(name) != actual[name]:
            return f"{name} does not match its checksum"
    return None


def hold(folder: Path) -> AbstractContextManager[object]:
    """Keep a run's checkpoint folder for this process alone. Raises `UserError` where another has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / "lock").acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process is training into {folder}; wait for it or stop it") from None
    except OSError as error:
        raise UserError(f"cannot use {folder} ({error.strerror}); choose another place for checkpoints") from None


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _dcp() -> ModuleType:
    """Loaded by whoever first writes or reads: it takes most of a second."""
    import torch.distributed.checkpoint

    # For good: what saves in the background is another thread, to which no context reaches.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return torch.distributed.checkpoint


def _checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, by its path inside the checkpoint."""
    sums = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                sums[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _reason(error: BaseException) -> str:
    """A failed collective save holds the failure of each rank; the first tells enough."""
    if isinstance(error, _dcp().api.CheckpointException):
        return str(next(iter(error.failures.values()))[0])
    return str(error)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
