"""`sweep`: a list of recipes, each run once, whichever engine runs them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

from rich.console import Console

from rodimus_lab.device import device_type
from rodimus_lab.errors import UserError
from rodimus_lab.recipe import Recipe
from rodimus_lab.sweep.board import Board
from rodimus_lab.sweep.outcome import Outcome, RunFunction, SweepOptions, attempt
from rodimus_lab.sweep.workers import run_on_ray, where
from rodimus_lab.train import Interrupted, TrainOptions, train


def sweep(
    recipes: Sequence[Recipe],
    options: SweepOptions | None = None,
    train_options: TrainOptions | None = None,
    *,
    run: RunFunction = train,
    console: Console | None = None,
) -> list[Outcome]:
    """Run each recipe once, over Ray where it is installed, and say what became of each, in the order given.

    Finished runs are skipped and broken ones go on from their checkpoint. A run that fails does not stop the others.
    `run` takes a recipe and `TrainOptions` and returns the record; over Ray it must be picklable. It writes the run's
    record and metrics, and keeps two processes from the same run, as `train` does. Raises `Interrupted` once all
    runs have stopped where the sweep is told to end, and `UserError` for what stands in its way.
    """
    options, train_options = options or SweepOptions(), train_options or TrainOptions()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun spreads one run over its ranks, and a sweep starts its own workers; use one of them")
    outcomes = [Outcome.of(recipe, train_options) for recipe in {recipe.id: recipe for recipe in recipes}.values()]
    waiting = [outcome for outcome in outcomes if outcome.state == "waiting"]
    with_ray = not options.serial and find_spec("ray") is not None
    if options.ray_address and not with_ray:
        raise UserError("Ray is not installed, so there is no cluster to join; pip install -e '.[sweep]'")
    if not with_ray or where(options) == "local":
        device_type("cuda" if options.runs_per_gpu else train_options.device)
    board = Board(outcomes, console)
    if not (with_ray or options.serial):
        board.say("Ray is not installed, so the runs go one after another; pip install -e '.[sweep]' for more at once")
    code = None
    if waiting:
        train_options = replace(train_options, progress=False)
        if with_ray:
            code = run_on_ray(waiting, options, train_options, run, board)
        else:
            code = run_serially(waiting, options, train_options, run, board)
    for outcome in outcomes:
        if outcome.state == "failed":
            outcome.look()  # Another process that had it may have finished it since.
    if code is not None:
        done = sum(outcome.state == "finished" for outcome in outcomes)
        raise Interrupted(
            f"the sweep was stopped by {signal.Signals(code - 128).name} with {done} of {len(outcomes)} runs finished; "
            "the same command goes on from the checkpoints",
            code,
        )
    return outcomes


def run_serially(
    outcomes: Sequence[Outcome], options: SweepOptions, train_options: TrainOptions, run: RunFunction, board: Board
) -> int | None:
    """Run them in this process. Gives the exit code where a signal ended the sweep."""
    with board, _sigterm_interrupts() as received:
        for outcome in outcomes:
            while outcome.state == "waiting":
                now = outcome.begin(train_options)
                outcome.state = "running"
                board.note(outcome)
                try:
                    end = attempt(run, outcome.recipe, now)
                except KeyboardInterrupt:
                    outcome.state = "stopped"
                    return 128 + (received[0] if received else signal.SIGINT)
                outcome.end(end, options.retries)
                board.note(outcome)
                if end.detail:
                    board.say(end.detail)
                if end.end == "stopped" and end.exit_code:
                    return end.exit_code
    return None


@contextmanager
def _sigterm_interrupts() -> Iterator[list[int]]:
    """Let SIGTERM leave as Ctrl-C does, by the blocks' own ends; it is then in the list."""
    received: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    try:
        former = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # Not the main thread, which alone hears signals.
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, former)
