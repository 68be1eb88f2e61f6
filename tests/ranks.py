"""Ranks of a process group as copies of this process: what they import is here already."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LIMIT_SECONDS = 200


class Rank(NamedTuple):
    """How a rank ended, and what it wrote to stderr."""

    code: int
    err: str


def start_ranks(count: int, main: Callable[[int], int], folder: Path) -> list[Rank]:
    """Run `main(rank)` in so many processes with torchrun's variables; what it returns is the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    logs = [folder / f"rank-{rank}.err" for rank in range(count)]
    children = [_child(rank, main, log, variables) for rank, log in enumerate(logs)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(codes) < count:
        for child in children:
            ended, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, 9)
        time.sleep(0.02)
    return [Rank(codes[child], log.read_text()) for child, log in zip(children, logs, strict=True)]


def _child(rank: int, main: Callable[[int], int], log: Path, variables: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
        err = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(err, 2)
        sys.stderr = os.fdopen(err, "w", buffering=1)
        code = main(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
    return code
