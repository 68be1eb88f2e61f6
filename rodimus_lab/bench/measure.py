"""How long a call takes, how much memory it takes, and how fast memory is: the only stopwatch of the benchmarks."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Call = Callable[[], Any]
WARMUP = 2
HEAD_START = 1.5
CYCLES_PER_SECOND = 2e9  # Of the device's clock, at most.
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


def seconds_of(
    call: Call, device: torch.device, repeats: int, warmup: int = WARMUP, *, head_start: bool = False
) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` untimed ones, on CUDA measured between events.

    With `head_start` the device idles until the host has launched the calls, so that kernels shorter than their launch
    are timed and not the host.
    """
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        return [_by_the_clock(call) for _ in range(repeats)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    if head_start:
        torch.cuda._sleep(int(HEAD_START * repeats * _by_the_clock(call) * CYCLES_PER_SECOND))
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _by_the_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(
    call: Call, device: torch.device, repeats: int, warmup: int = WARMUP, *, head_start: bool = False
) -> float:
    return statistics.median(seconds_of(call, device, repeats, warmup, head_start=head_start))


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes of tensors that `call` had beside what was there before it.

    On CUDA from the allocator; elsewhere from the tensors that operators return, so what a single kernel takes and
    gives back inside is not seen.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        call()
    return live.peak


def copy_rate(device: torch.device, repeats: int = 10) -> float:
    """Bytes a second that a large copy reads and writes, together: the rate that memory floors are counted at."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device, repeats)


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.level = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_iter(result):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._live and key not in given:
                self._live.add(key)
                self.level += size
                self.peak = max(self.peak, self.level)
                weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.level -= size
