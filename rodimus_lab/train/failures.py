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
import socket
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
SILENT_SECONDS = 20.0  # Without a beat, once told to end; torchrun kills ten seconds later.
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
        self._signals, self._heard = _numbers_of_signals()
        self._told = False
        self._thread = threading.Thread(target=self._watch, name="ledger", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        if self._heard is not None:
            signal.set_wakeup_fd(-1)

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
            self._speaking.acquire()
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
        return self._lost(lost) if lost else _kept(f"the connection broke: {_first_line(error)}")

    def _lost(self, ranks: list[int]) -> RankLost:
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        return _kept(f"{who} of {self.size} ended without a word")

    def _beats(self) -> list[bytes]:
        keys = [f"beat-{rank}" for rank in range(self.size)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]

    def _watch(self) -> None:
        number, silence = 0, Silence(self.rank, self.size)
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
                if self._told_to_end():
                    lost = silence.after(self._beats())
                    first = self.rank == min(set(range(self.size)) - set(lost))
                    if lost and first and self._speaking.acquire(blocking=False):
                        print(self._lost(lost), file=sys.stderr)
                        end_process(1)
            except RuntimeError:
                return

    def _told_to_end(self) -> bool:
        """Whether torchrun, which has seen a rank end, told this one to. Where the main thread waits in a collective on
        a GPU, it can neither fail nor hear of it."""
        with contextlib.suppress(BlockingIOError):
            self._told |= signal.SIGTERM in (self._signals.recv(64) if self._signals else b"")
        return self._told


class Silence:
    """Since when the other ranks have not been heard of."""

    def __init__(self, rank: int, size: int):
        self._rank, self._beats, self._since = rank, [b""] * size, [0.0] * size

    def after(self, beats: list[bytes]) -> list[int]:
        """The ranks whose beats are what they were `SILENT_SECONDS` before."""
        now = time.monotonic()
        for rank, (beat, before) in enumerate(zip(beats, self._beats, strict=True)):
            if beat != before or not self._since[rank]:
                self._since[rank] = now
        self._beats = beats
        return [r for r, since in enumerate(self._since) if r != self._rank and now - since >= SILENT_SECONDS]


def _numbers_of_signals() -> tuple[socket.socket | None, socket.socket | None]:
    """A socket that signals are written into, whatever the main thread does, and its other end."""
    if threading.current_thread() is not threading.main_thread():
        return None, None
    read, write = socket.socketpair()
    read.setblocking(False)
    write.setblocking(False)
    signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    return read, write


def _kept(reason: str) -> RankLost:
    return RankLost(f"{reason}; the last checkpoint is kept, and the same command goes on from there")


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
