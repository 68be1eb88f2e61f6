"""One table of all runs, renewed while they go on: a live one on a terminal, elsewhere a line for each change and,
every ten seconds, one for each run under way.

Steps, losses and speeds are read from what the runs write on disk, so it is all the same where they run.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rodimus_lab.records import METRICS
from rodimus_lab.sweep.outcome import Outcome
from rodimus_lab.train.journal import TIMING
from rodimus_lab.train.progress import PLAIN_SECONDS

TAIL_BYTES = 4096
ORDER = ("running", "failed", "waiting", "stopped", "finished")


class Board:
    """Context manager around the sweep. A thread renews what is shown, so a run in this process is seen as well."""

    def __init__(self, outcomes: Sequence[Outcome], console: Console | None = None):
        self._outcomes = outcomes
        self._console = console or Console(soft_wrap=True, highlight=False, markup=False)
        self._live = (
            Live(get_renderable=self.table, console=self._console, refresh_per_second=1)
            if self._console.is_terminal and not self._console.quiet
            else None
        )
        self._shown: dict[str, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._live:
            self._live.stop()
        else:
            self._thread.join()

    def note(self, outcome: Outcome) -> None:
        """Say that a run has changed its state."""
        if self._live is None:
            where = f" (attempt {outcome.attempts})" if outcome.state == "running" else ""
            why = f": {outcome.reason}" if outcome.reason and outcome.state != "running" else ""
            self.say(f"{outcome.recipe.id}  {outcome.state}{where}{why}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def table(self) -> Table:
        """Every run, or, where the terminal is too low for all, those that are under way before the others."""
        outcomes, room = list(self._outcomes), max(1, self._console.height - 6)
        counts: Counter[str] = Counter(outcome.state for outcome in outcomes)
        if len(outcomes) > room:
            outcomes = sorted(outcomes, key=lambda outcome: ORDER.index(outcome.state))[:room]
        table = Table(
            caption=", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state]), caption_justify="left"
        )
        table.add_column("Run", no_wrap=True)
        for header in ("Step", "Loss or accuracy", "Tokens/s"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("State", no_wrap=True)
        table.add_column("Attempt", justify="right")
        for outcome in outcomes:
            tries = str(outcome.attempts) if outcome.attempts else "-"
            table.add_row(outcome.recipe.id, *progress(outcome), outcome.state, tries)
        return table

    def _tell(self) -> None:
        while not self._over.wait(PLAIN_SECONDS):
            for outcome in self._outcomes:
                if outcome.state != "running":
                    continue
                step, value, rate = progress(outcome)
                line = f"{outcome.recipe.id}  step {step}  {value}  {rate} tokens/s"
                if step != "-" and line != self._shown.get(outcome.recipe.id):
                    self._shown[outcome.recipe.id] = line
                    self.say(line)


def progress(outcome: Outcome) -> tuple[str, str, str]:
    """The step of all steps, the newest loss or accuracy with its name, and tokens a second; - for what is unknown."""
    lines = tail(outcome.run.path / METRICS)
    seen: dict[str, Any] = {}
    for line in lines:
        seen |= line
    step = f"{seen['step']:,}/{outcome.recipe.budget.steps:,}" if "step" in seen else "-"
    name = next((name for name in ("loss", "accuracy") if name in seen), None)
    rates = tail(outcome.checkpoints / TIMING)
    rate = f"{rates[-1]['tokens_per_second']:,.0f}" if rates else "-"
    return step, f"{name} {seen[name]:.4f}" if name else "-", rate


def tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file of JSON lines that another process may be writing; none where it is not there."""
    try:
        with path.open("rb") as file:
            start = max(0, path.stat().st_size - TAIL_BYTES)
            file.seek(start)
            *lines, _torn = file.read().split(b"\n")
        return [json.loads(line) for line in lines[start > 0 :]]
    except (OSError, ValueError):
        return []
