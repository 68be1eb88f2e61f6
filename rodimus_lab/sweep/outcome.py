"""What is asked of a sweep, and what becomes of each of its runs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rodimus_lab.errors import UserError
from rodimus_lab.recipe import Recipe
from rodimus_lab.records import RunDir, runs_root
from rodimus_lab.train import Interrupted, TrainOptions
from rodimus_lab.weights import checkpoints_root

State = Literal["waiting", "running", "finished", "failed", "stopped"]
RunFunction = Callable[[Recipe, TrainOptions], Mapping[str, Any]]


@dataclass(frozen=True)
class SweepOptions:
    """How runs are spread; nothing here changes their outcome.

    `jobs`: at most so many at once, by default as many as there is room for. `runs_per_gpu` share a GPU and its memory
    evenly, by default 1. `cpus_per_run`: by default this machine's cores divided among the runs, on a cluster 1.
    `retries`: how often a run is given again whose worker died or that failed for no reason that a user could mend.
    `ray_address`: HOST:PORT of a cluster, or auto; by default $RAY_ADDRESS, else an engine of this machine alone.
    `serial`: one after another in this process, as without Ray.
    """

    jobs: int | None = None
    runs_per_gpu: int | None = None
    cpus_per_run: int | None = None
    retries: int = 2
    ray_address: str | None = None
    serial: bool = False

    def __post_init__(self) -> None:
        for name, least in (("jobs", 1), ("runs_per_gpu", 1), ("cpus_per_run", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        if self.serial:
            for name in ("jobs", "runs_per_gpu", "cpus_per_run", "ray_address"):
                if getattr(self, name) is not None:
                    raise UserError(f"serial runs go one after another in this process; leave out serial or {name}")


class Attempt(NamedTuple):
    """How one attempt at a run ended. What is `broken` may be tried again; `detail` is its traceback."""

    end: Literal["finished", "failed", "broken", "stopped"]
    reason: str = ""
    record: Mapping[str, Any] | None = None
    detail: str = ""
    exit_code: int = 0


@dataclass
class Outcome:
    """A run of the sweep. `attempts` is 0 for one that was finished before; `reason` says why it failed or stopped."""

    recipe: Recipe
    run: RunDir
    checkpoints: Path
    state: State = "waiting"
    attempts: int = 0
    record: Mapping[str, Any] | None = field(default=None, repr=False)
    reason: str = ""

    @classmethod
    def of(cls, recipe: Recipe, options: TrainOptions) -> Outcome:
        """The run of a recipe as it stands on disk: finished, or waiting."""
        run = RunDir(options.runs_root or runs_root(), recipe.experiment, recipe.id)
        folder = (options.checkpoints_root or checkpoints_root()) / recipe.experiment / recipe.id
        outcome = cls(recipe, run, folder)
        outcome.look()
        return outcome

    def look(self) -> None:
        """Note it where the record is there. Raises `UserError` for one that cannot be read."""
        if self.run.finished:
            self.record = self.run.read_record()
            self.state, self.reason = "finished", ""

    def begin(self, options: TrainOptions) -> TrainOptions:
        """Count an attempt, and give its options: only the first may start an unfinished run afresh."""
        self.attempts += 1
        return options if self.attempts == 1 else replace(options, resume=True)

    def end(self, attempt: Attempt, retries: int) -> None:
        """Take in how an attempt ended; what may be tried again waits once more."""
        self.reason, self.record = attempt.reason, attempt.record
        if attempt.end == "broken":
            self.state = "waiting" if self.attempts <= retries else "failed"
        else:
            self.state = attempt.end


def attempt(run: RunFunction, recipe: Recipe, options: TrainOptions) -> Attempt:
    """Run a recipe, and say how it ended in words that travel between processes."""
    try:
        return Attempt("finished", record=dict(run(recipe, options)))
    except Interrupted as stop:
        return Attempt("stopped", str(stop), exit_code=stop.exit_code)
    except UserError as error:
        return Attempt("failed", str(error))
    except Exception as error:
        return Attempt("broken", f"{type(error).__name__}: {error}", detail=traceback.format_exc())


def failures(outcomes: Iterable[Outcome]) -> str | None:
    """The runs that failed for good and why, one a line under a count; None where none did."""
    outcomes = list(outcomes)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if not failed:
        return None
    lines = [f"{len(failed)} of {len(outcomes)} runs failed:"]
    for outcome in failed:
        tries = f" ({outcome.attempts} attempts)" if outcome.attempts > 1 else ""
        lines.append(f"  {outcome.recipe.id}: {outcome.reason}{tries}")
    return "\n".join(lines)
