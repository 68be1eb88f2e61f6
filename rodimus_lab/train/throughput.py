"""Tokens a second, and what share of the device's arithmetic they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rodimus_lab.scoring import Precision

# Dense bfloat16 FLOP/s from NVIDIA's data sheets. The first name that a device's name contains counts.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(name: str, precision: Precision) -> float | None:
    """Peak FLOP/s of the device of that name, or None where it is not known."""
    peak = next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)
    if peak is None or precision == "fp32":
        return None
    return peak if precision == "bf16" else peak / 2  # TensorFloat32 runs at half the rate on all of these.


def utilization(flops_per_token: float, tokens_per_second: float | None, peak: float | None) -> float | None:
    """Model FLOP/s over the peak (MFU), 0 to 1."""
    return flops_per_token * tokens_per_second / peak if peak and tokens_per_second else None


class Stopwatch:
    """Times windows of training. What runs inside `paused` (evaluation, checkpoints) does not count, nor does the first
    window of a session, in which kernels are compiled; `wait` blocks until the device has caught up."""

    def __init__(self, wait: Callable[[], None]):
        self._wait = wait
        self._paused = 0.0
        self._mark: tuple[int, float] | None = None
        self.rates: list[float] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self._paused += time.perf_counter() - start

    def lap(self, tokens: int) -> float | None:
        """Tokens a second since the last lap, where `tokens` have been trained on in all; None at the first lap."""
        self._wait()
        now = time.perf_counter()
        rate = None
        if self._mark is not None:
            rate = (tokens - self._mark[0]) / max(now - self._mark[1] - self._paused, 1e-9)
            self.rates.append(rate)
        self._mark, self._paused = (tokens, now), 0.0
        return rate


def median(rates: list[float]) -> float | None:
    return statistics.median(rates) if rates else None
