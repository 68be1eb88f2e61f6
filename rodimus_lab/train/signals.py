"""Stopping between two steps when the process is told to end."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from rodimus_lab.errors import UserError


class Interrupted(UserError):
    """Training stopped before its end, with its checkpoint written. `exit_code` is what the process ends with."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class StopSignal:
    """Context: SIGTERM and SIGINT are noted in `received`; a second one ends the process at once. One that is ignored,
    such as SIGINT by a job that a script runs in the background, stays ignored."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
