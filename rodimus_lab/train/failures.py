"""How ranks tell one another that they end, so that one sentence is said, and by rank 0 where it lives.

They do so through the store that they met at, each with a connection and a thread of its own: a rank that hangs in a
collective with one that has failed still learns of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import torch.distributed as dist

from rodimus_lab.errors import UserError
from rodimus_lab.train.signals import Interrupted

BEAT_SECONDS = 0.4
LOST_SECONDS = 2.0  # Without a beat; only asked where a collective has failed, so a slow rank comes to no harm.
GRACE_SECONDS = 8.0
CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|socket", re.IGNORECASE)


class RankLost(UserError):
    """A rank ended without a word, or can be reached no more."""

    exit_code = 1


class Ledger:
    """What the ranks of one session know of one another's end."""

    def __init__(self, store: Any, rank: int, size: int):
        self.rank, self.size = rank, size
        self._store = dist.PrefixStore("ledger", store.clone())
        self._speaking = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ledger", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def verdict(self, error: Exception) -> Exception:
        """The error that this rank is to raise, having failed with `error`; where it is not to speak, it ends here."""
        with contextlib.suppress(ValueError):  # Not the main thread.
            # torchrun ends the others as soon as one has ended; let this one finish its sentence.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return self._verdict(error)
        except RuntimeError:  # The store is gone with whoever kept it.
            if isinstance(error, Interrupted) and self.rank:
                end_process(error.exit_code)
            return error

    def _verdict(self, error: Exception) -> Exception:
        if isinstance(error, Interrupted):  # All ranks stop alike.
            if self.rank:
                self._await_word()
                end_process(error.exit_code)
            self._store.set("spoken", "1")
            return error
        if _is_of_connection(error):
            told = self._await_cause()
            error = RankLost(told) if told else self._who_is_lost(error)
        code = error.exit_code if isinstance(error, UserError) else 1
        self._store.compare_set("failure", "", json.dumps([self._sentence(error), code]))
        if self.rank == 0:
            self._speaking.acquire()
            self._store.set("spoken", "1")
            return error
        if not isinstance(error, UserError):  # A fault of the program: its traceback is this rank's to show.
            error.add_note(f"on rank {self.rank} of {self.size}")
            return error
        if self._await_word():
            end_process(code)
        return type(error)(self._sentence(error)) if type(error) in (UserError, RankLost) else error

    def _sentence(self, error: Exception) -> str:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return text if isinstance(error, RankLost) or not self.rank else f"rank {self.rank}: {text}"

    def _await_word(self) -> bool:
        """Whether another rank has spoken for this one in time."""
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            if self._store.check(["spoken"]):
                return True
            time.sleep(0.1)
        return False

    def _await_cause(self) -> str | None:
        """The sentence of a rank that failed of itself, which a broken connection is the echo of."""
        end = time.monotonic() + BEAT_SECONDS
        while time.monotonic() < end:
            if self._store.check(["failure"]):
                return str(json.loads(self._store.get("failure"))[0])
            time.sleep(0.05)
        return None

    def _who_is_lost(self, error: Exception) -> RankLost:
        before = self._beats()
        time.sleep(LOST_SECONDS)
        after = self._beats()
        lost = [rank for rank in range(self.size) if rank != self.rank and before[rank] == after[rank]]
        who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
        reason = f"{who} of {self.size} ended without a word" if lost else f"the connection broke: {_first_line(error)}"
        return RankLost(f"{reason}; the last checkpoint is kept, and the same command goes on from there")

    def _beats(self) -> list[bytes]:
        keys = [f"beat-{rank}" for rank in range(self.size)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]

    def _watch(self) -> None:
        number = 0
        while not self._closed.wait(BEAT_SECONDS):
            try:
                number += 1
                self._store.set(f"beat-{self.rank}", str(number))
                if self.rank == 0 and self._store.check(["failure"]):
                    sentence, code = json.loads(self._store.get("failure"))
                    # The main thread, if it failed as well, speaks itself.
                    time.sleep(BEAT_SECONDS)
                    if self._speaking.acquire(blocking=False):
                        print(f"error: {sentence}" if code == 2 else sentence, file=sys.stderr)
                        self._store.set("spoken", "1")
                        end_process(code)
            except RuntimeError:
                return


def _is_of_connection(error: Exception) -> bool:
    if isinstance(error, UserError):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(CONNECTION.search(str(error)))
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def end_process(code: int) -> NoReturn:
    """End a process that was a rank, without Python's own tidying up: sharded models leave the threads of their process
    group behind, and one of these may abort the process while Python goes down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
