"""Metrics and settings as people read them: with units, digits in groups, and no more digits than say something."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

SHARES = r"(.*_)?(accuracy|acc(_norm)?(_stderr)?|mfu(_6n)?|of_floor(_with_state)?|relative_error)"


def told(name: str, value: Any) -> str:
    """A metric or a fact under its dotted name: bytes, seconds, shares, rates and losses in their units."""
    if not _is_number(value):
        return setting(name, value)
    last = name.rpartition(".")[2]
    write = next((write for pattern, write in UNITS if re.fullmatch(pattern, last)), None)
    return write(value) if write else setting(name, value) if isinstance(value, int) else rounded(value)


def setting(name: str, value: Any) -> str:
    """A setting with all of its digits, for one that was rounded would be another one."""
    if value is None or value in ([], {}):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if not _is_number(value):
        return json.dumps(value)
    whole = int(value) if float(value).is_integer() and abs(value) < 1e15 else value
    return str(whole) if name.rpartition(".")[2] == "seed" else f"{whole:,}"


def rounded(value: float) -> str:
    """At least four digits: 1,133,565 and 263.86, 59.48, 0.04555, 4.642e-05; whole numbers as such."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 10_000 else f"{value:,.2f}" if size >= 100 else f"{value:.4g}"


def shortened(text: str) -> str:
    """A number of more than six digits after its point as `rounded` writes it; any other text as it is."""
    return rounded(float(text)) if re.fullmatch(r"-?\d+\.(\d{7,}|\d+e-?\d+)", text) else text


def bytes_text(number: float) -> str:
    """10^6 bytes as 1.00 MB."""
    for unit, worth in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(number) >= worth:
            return f"{_three(number / worth)} {unit}"
    return f"{number:g} B"


def seconds_text(seconds: float) -> str:
    """0.0027 as 2.7 ms, 331.6 as 5 min 32 s, 7260 as 2 h 1 min."""
    for unit, worth in (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if 0 < abs(seconds) < {"µs": 1e-3, "ms": 1.0, "s": 60.0}[unit]:
            return f"{_three(seconds / worth)} {unit}"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def _three(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:#.3g}".rstrip(".")


def _flops(number: float) -> str:
    return f"{number / 1e12:,.4g} TFLOP/s"


# By the last part of a name, the first that fits.
UNITS: tuple[tuple[str, Callable[[float], str]], ...] = (
    (r"(.*_)?bytes", bytes_text),
    (r"(.*_)?seconds(_per_.*)?", seconds_text),
    (r"tokens_per_second", lambda number: f"{rounded(number)} tokens/s"),
    (r"peak_flops", _flops),
    (r"(.*_)?loss", lambda number: f"{rounded(number)} nats"),
    (SHARES, lambda share: f"{100 * share:.4g} %"),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
