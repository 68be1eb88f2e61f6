"""What a person watching sees: a live bar on a terminal, elsewhere one plain line every ten seconds."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

PLAIN_SECONDS = 10.0


class Progress:
    """Context manager. `enabled` turns the running display off; `say` speaks all the same. A step is called `unit`."""

    def __init__(
        self, title: str, steps: int, *, unit: str = "step", enabled: bool = True, console: Console | None = None
    ):
        self._unit = unit
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._title, self._steps = title, steps
        self._enabled, self._live = enabled, enabled and self._console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
        )
        self._bar = Bar(*columns, console=self._console, disable=not self._live)
        self._task = self._bar.add_task(title, total=steps, status="")
        self._status = ""
        self._next_line = time.monotonic() + PLAIN_SECONDS

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def report(self, loss: float, rate: float | None, mfu: float | None, seconds_left: float | None) -> None:
        """Renew what is shown beside the step: loss in nats, tokens a second, MFU (0 to 1; left out where the device's
        peak is not known), time left."""
        speed = "-" if rate is None else f"{rate:,.0f}"
        share = "" if mfu is None else f"MFU {mfu:.1%}  "
        left = "-" if seconds_left is None else str(timedelta(seconds=round(seconds_left)))
        self._status = f"loss {loss:.4f}  {speed} tokens/s  {share}ETA {left}"

    def advance(self, step: int) -> None:
        if self._live:
            self._bar.update(self._task, completed=step, status=self._status)
        elif self._enabled and (time.monotonic() >= self._next_line or step == self._steps):
            self._next_line = time.monotonic() + PLAIN_SECONDS
            self.say(f"{self._title}  {self._unit} {step:,}/{self._steps:,}  {self._status}".rstrip())

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)
