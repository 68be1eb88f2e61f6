"""Programs that a model wrote, each in a process of its own that is limited and shut off; `child.py` says how.

`namespaces`, on a Linux that lets the user make them: the interpreter's files, read-only, and an empty folder in
memory; no other process, no network interface. `hooks`, elsewhere, as in most containers: files are read as this user
reads them and written in one temporary folder, and no process is started.

In both there are limits on time, memory, the size of files, processes and open files, an empty environment and, on
Linux, a filter of system calls, which refuses sockets (on x86-64 and ARM64). `hooks` holds against what models write by
accident; a program made to break Python from inside may get past it.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import selectors
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rodimus_lab.errors import UserError

Isolation = Literal["namespaces", "hooks"]
CHILD = Path(__file__).with_name("child.py")
START_UP = 20.0  # Seconds that a crowded machine may take to start the process and to end it.
MOST_BYTES = 1 << 16
READY = b'{"ready"'
OWN_FOLDER = "/program"  # Not /tmp: Python itself may lie below that.
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PROBE = "import bisect, collections, functools, hashlib, heapq, itertools, math, random, re, socket, subprocess, typing"


class Limits(NamedTuple):
    """Of one program: `seconds` of wall clock and of each process's CPU time, bytes of `memory` for each process, of
    all its `files`, and how many `processes` and threads."""

    seconds: int = 10
    memory: int = 1 << 30
    files: int = 16 << 20
    processes: int = 8


DEFAULT = Limits()


class Verdict(NamedTuple):
    """Whether a program ran to its end, and why not."""

    passed: bool
    reason: str = ""


def run_program(program: str, limits: Limits = DEFAULT, isolation: Isolation | None = None) -> Verdict:
    """Run Python source to its end, or not. Raises `UserError` where the isolation cannot be had."""
    isolation = isolation or best_isolation()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as made:
        folder = os.path.realpath(made)
        order = limits._asdict() | {
            "program": program,
            "token": token,
            "isolation": isolation,
            "root": folder,
            "folder": OWN_FOLDER if isolation == "namespaces" else folder,
            "readable": _readable(),
            "paths": [sysconfig.get_path("purelib")],
            "serial": secrets.randbelow(1 << 24),
        }
        answer = _talk(json.dumps(order).encode(), limits.seconds, folder)
    if answer is None:
        return Verdict(False, f"no end within {limits.seconds} s")
    lines = [_object(line) for line in answer.splitlines()]
    if lines and "broken" in lines[0]:
        raise UserError(f"the sandbox cannot be set up ({lines[0]['broken']}); run elsewhere, or as another user")
    if any(said.get("token") == token and said.get("passed") is True for said in lines):
        return Verdict(True)
    reasons = [str(said["reason"]) for said in lines if said.get("reason")]
    return Verdict(False, reasons[-1] if reasons else "ended before its end")


def run_programs(
    programs: Sequence[str], limits: Limits = DEFAULT, isolation: Isolation | None = None
) -> list[Verdict]:
    """The same for several, as many at once as there are cores, at most 8; in order."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda program: run_program(program, limits, isolation), programs))


@cache
def best_isolation() -> Isolation:
    """`namespaces` where this machine permits them, else `hooks`. Raises `UserError` where neither runs a program that
    does nothing but import from the standard library."""
    kinds: tuple[Isolation, ...] = ("namespaces", "hooks") if platform.system() == "Linux" else ("hooks",)
    reason = "there is no resource module"
    for kind in kinds if os.name == "posix" else ():
        try:
            verdict = run_program(PROBE, isolation=kind)
        except UserError as error:
            reason = str(error)
            continue
        if verdict.passed:
            return kind
        reason = verdict.reason
    raise UserError(f"generated code cannot be shut off on this machine ({reason}); evaluate without it, or on Linux")


def _talk(order: bytes, seconds: float, folder: str) -> bytes | None:
    """What the child writes until it ends; None where it does not in time. It and all that it started are gone then."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "HOME": ".", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"} | ONE_THREAD,
        cwd=folder,
        start_new_session=True,
        close_fds=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    answer = b""
    deadline = time.monotonic() + START_UP
    try:
        try:
            process.stdin.write(order)
            process.stdin.close()
        except BrokenPipeError:
            return b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(answer) < MOST_BYTES:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                piece = os.read(process.stdout.fileno(), MOST_BYTES)
                if not piece:
                    return answer
                if piece.startswith(READY) and not answer:
                    deadline = time.monotonic() + seconds
                answer += piece
        return answer
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _object(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


@cache
def _readable() -> list[str]:
    """What Python needs to be read: its own folders and the system's libraries, none inside another."""
    asked = [*SYSTEM, sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    found: list[str] = []
    for path in map(os.path.abspath, asked):
        if os.path.lexists(path) and not any(f"{path}/".startswith(f"{other}/") for other in found):
            found.append(path)
    return found
