"""Runs as tasks of Ray: it queues them, gives each its share of the machines, and its workers their processes.

A task says when it starts and how it ends. Ray's own retries are off: an attempt that broke is given again from here,
so that it is counted and shown, and it goes on from its checkpoint.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rodimus_lab.data import cache_root, data_root
from rodimus_lab.errors import UserError
from rodimus_lab.records import runs_root
from rodimus_lab.registry import load_plugins
from rodimus_lab.sweep.board import Board
from rodimus_lab.sweep.outcome import Attempt, Outcome, RunFunction, SweepOptions, attempt
from rodimus_lab.train import TrainOptions
from rodimus_lab.train.signals import StopSignal
from rodimus_lab.weights import checkpoints_root

POLL_SECONDS = 0.3
CONNECT_SECONDS = 5.0
STORE_BYTES = 100 * 2**20  # Recipes and records are all that travels.
STARTED: Literal["started"] = "started"


def where(options: SweepOptions) -> str:
    """The cluster's address; `started` for one that this process is connected to, `local` for one yet to be started."""
    ray = sys.modules.get("ray")
    connected = "started" if ray is not None and ray.is_initialized() else None
    return options.ray_address or connected or os.environ.get("RAY_ADDRESS") or "local"


def run_on_ray(
    outcomes: Sequence[Outcome], options: SweepOptions, train_options: TrainOptions, run: RunFunction, board: Board
) -> int | None:
    """Run them in Ray's workers. Gives the exit code where a signal ended the sweep, once every worker has stopped."""
    address = where(options)
    cores = os.cpu_count() or 1
    together = min(options.jobs or cores, len(outcomes))
    cpus = options.cpus_per_run or (max(1, cores // together) if address == "local" else 1)
    with _connected(address, max(cores, cpus * (options.jobs or 0))) as ray:
        gpus = _gpu_share(ray, options, train_options.device)
        _check_room(ray, cpus, gpus)
        train_options = _absolute(replace(train_options, device="cuda" if gpus else "cpu"))
        task = ray.remote(_work).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=0, num_returns="streaming", name="rodimus-lab"
        )
        surroundings = Surroundings.here()
        waiting, live = deque(outcomes), dict[Any, Outcome]()
        stopping = False
        with board, StopSignal() as signals:
            while live or waiting:
                if signals.received and not stopping:
                    stopping = True
                    waiting.clear()
                    board.say(f"{signals.received.name}: the runs write their checkpoints and stop")
                    for handle in live:
                        ray.cancel(handle)  # As Ctrl-C in the worker, where training hears it between two steps.
                while waiting and len(live) < (options.jobs or len(outcomes)):
                    outcome = waiting.popleft()
                    now = outcome.begin(train_options)
                    payload = ray.cloudpickle.dumps((run, outcome.recipe, now))
                    live[task.remote(surroundings, payload, gpus)] = outcome
                if not live:
                    break
                for handle in ray.wait(list(live), num_returns=1, timeout=POLL_SECONDS)[0]:
                    outcome, news = live[handle], _news(ray, handle)
                    if news == STARTED:
                        outcome.state = "running"
                    else:
                        del live[handle]
                        _settle(outcome, news, stopping, options.retries, board)
                        if outcome.state == "waiting":
                            waiting.append(outcome)
                    board.note(outcome)
        return 128 + signals.received if signals.received else None


@dataclass(frozen=True)
class Surroundings:
    """What a worker is to find as it is here: variables, the folder that relative paths start from, where modules are
    looked for."""

    environment: dict[str, str]
    folder: str
    path: list[str]

    @classmethod
    def here(cls) -> Surroundings:
        """Of this process, its places in full."""
        roots = {
            "RODIMUS_LAB_DATA": data_root(),
            "RODIMUS_LAB_CACHE": cache_root(),
            "RODIMUS_LAB_RESULTS": runs_root(),
            "RODIMUS_LAB_CHECKPOINTS": checkpoints_root(),
        }
        own = {name: value for name, value in os.environ.items() if name.startswith("RODIMUS_LAB_")}
        places = {name: str(root.absolute()) for name, root in roots.items() if root}
        return cls(own | places, str(Path.cwd()), [str(Path(entry).absolute()) for entry in sys.path])

    def enter(self) -> None:
        os.environ.update(self.environment)
        with suppress(OSError):  # Another machine may not have it.
            os.chdir(self.folder)
        sys.path.extend(entry for entry in self.path if entry not in sys.path)


def _work(surroundings: Surroundings, payload: bytes, gpus: float) -> Iterator[str | Attempt]:
    """The task, in a worker: `payload` is the pickled function, recipe and options, opened once modules are found."""
    surroundings.enter()
    yield STARTED
    run, recipe, options = pickle.loads(payload)
    if 0 < gpus < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpus)
    load_plugins()
    yield attempt(run, recipe, options)


def _news(ray: Any, handle: Any) -> str | Attempt:
    """The next word of a task; where it has ended without one, how."""
    try:
        return ray.get(next(handle))
    except (ray.exceptions.TaskCancelledError, StopIteration):
        return Attempt("stopped", "it was cancelled; its last checkpoint is kept", exit_code=130)
    except ray.exceptions.RayTaskError as error:  # Before the run itself, such as a module that is not there.
        return Attempt("broken", f"{type(error.cause).__name__}: {error.cause}", detail=str(error))
    except ray.exceptions.RayError as error:
        return Attempt("broken", f"its worker was lost ({str(error).splitlines()[0]})")


def _settle(outcome: Outcome, end: Any, stopping: bool, retries: int, board: Board) -> None:
    """An attempt's end as the run's. A worker that alone was told to stop did not do so at the user's wish."""
    if end.end in ("stopped", "broken") and stopping:
        end = end._replace(end="stopped")
    elif end.end == "stopped" and end.exit_code:
        end = end._replace(end="broken")
    outcome.end(end, retries)
    if outcome.state == "stopped":
        outcome.look()  # It may have finished before the word to stop came.
    if end.detail:
        board.say(end.detail)


@contextmanager
def _connected(address: str, cpus: int) -> Iterator[Any]:
    """Ray, joined at an address or started for this machine alone; one that the caller has started is left running."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if address == "started":
        yield ray
        return
    facts: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        facts |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    elif address != "auto":
        _check_address(address)
    try:
        ray.init(**facts)
    except Exception as error:  # Whatever it is, the mend is outside of this process.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"Ray does not start at the address {address} ({reason}); mend that or use --serial") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise `UserError` where nothing listens, for which Ray itself would wait minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UserError(
            f"{address!r} is not the address of a Ray cluster; give HOST:PORT, such as 10.0.0.1:6379, or auto"
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"no Ray cluster answers at {address} ({reason.lower()}); start one with ray start --head"
        ) from None


def _gpu_share(ray: Any, options: SweepOptions, device: str | None) -> float:
    """The share of a GPU that a run gets, 0 for the CPU."""
    there = ray.cluster_resources().get("GPU", 0) > 0
    if not there and (options.runs_per_gpu or device == "cuda"):
        raise UserError("the Ray cluster has no GPU; add one, or leave out runs_per_gpu and choose the device cpu")
    return 1 / (options.runs_per_gpu or 1) if there and device != "cpu" else 0


def _check_room(ray: Any, cpus: int, gpus: float) -> None:
    """Raise `UserError` where no machine could ever take a run, for which Ray would wait for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        most = max(machine.get("CPU", 0) for machine in machines)
        raise UserError(f"cpus_per_run is {cpus}, but no machine has more than {most:.0f} CPUs to give; lower it")


def _absolute(options: TrainOptions) -> TrainOptions:
    runs, checkpoints = options.runs_root, options.checkpoints_root
    return replace(
        options,
        runs_root=runs and runs.absolute(),
        checkpoints_root=checkpoints and checkpoints.absolute(),
    )
