"""Kernels that start while the one before them is still running.

With programmatic dependent launch (Hopper and newer) a kernel is started as soon as every program of the one before it
has said `gdc_launch_dependents`. What it does before `gdc_wait` overlaps with that kernel; after it, everything that
the kernels before it wrote is visible. So a decoding kernel first loads what no kernel of the same step writes
(weights, its own state) and then waits. Every kernel waits, so that each one's end is the end of all before it.

Within a chain (chain.py) a kernel may wait by flag instead: `await_flags` in the place of `gdc_wait`, and `raise_flag`
as its last act. The interpreter runs kernels one after another, so there it need not wait.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rodimus_lab.ops import chain
from rodimus_lab.ops.fast_math import INTERPRETED

__all__ = ["await_flags", "gdc_launch_dependents", "gdc_wait", "launch_options", "linked_options", "raise_flag"]
LINE = tl.constexpr(chain.LINE)
# A thread looks at each of $2 counters, at $1 and 128 bytes apart, until it has its share of ($3 - $2 + 1) programs.
_LOOK = """{
    .reg .pred looks, more; .reg .b32 thread, share, now; .reg .b64 at;
    mov.u32 thread, %tid.x;
    setp.lt.u32 looks, thread, $2;
    sub.u32 share, $3, thread;
    div.u32 share, share, $2;
    mad.wide.u32 at, thread, 128, $1;
    mov.pred more, looks;
    look:
    @more ld.acquire.gpu.global.u32 now, [at];
    @more setp.lt.u32 more, now, share;
    @more bra look;
    bar.warp.sync 0xffffffff;
    bar.sync 0;
    mov.b32 $0, 0;
}"""
LOOK = tl.constexpr(_LOOK)
LOOK_RELAXED = tl.constexpr(
    _LOOK.replace("ld.acquire", "ld.relaxed").replace("bar.warp", "@looks fence.acq_rel.gpu; bar.warp")
)


def launch_options(x: Tensor) -> dict[str, Any]:
    """`PDL` for the kernel, and the launch option that goes with it, on the device of `x`."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda and _can_overlap(x.device) else {"PDL": False}


def linked_options(name: str, reads: Tensor, writes: Tensor, programs: int) -> dict[str, Any]:
    """`launch_options`, and the arguments of a kernel that may be in a chain; see `Chain.follow`."""
    now = chain.current.get()
    link = chain.UNLINKED if now is None else now.follow(name, reads, writes, programs)
    return launch_options(reads) | {
        "awaited_ptr": link.awaited,
        "arrived_ptr": link.arrived,
        "awaited": link.programs,
        "COPIES": chain.COPIES,
        "RELAXED": chain.RELAXED,
        "EARLY": now is not None and name in chain.EARLY,
    }


@cache
def _can_overlap(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def await_flags(awaited_ptr, awaited, COPIES: tl.constexpr, RELAXED: tl.constexpr, PDL: tl.constexpr):
    """Wait for all `awaited` programs of the kernel before; without flags, for its end.

    The barrier of the CTA hands what the looking threads have acquired to the others.
    """
    if awaited_ptr is None:
        if PDL:
            gdc_wait()
    elif not INTERPRETED:
        tl.inline_asm_elementwise(
            LOOK_RELAXED if RELAXED else LOOK,
            "=r,l,r,r", [awaited_ptr.to(tl.int64), COPIES, awaited + COPIES - 1], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def raise_flag(arrived_ptr, pid, COPIES: tl.constexpr):
    """Count this program in, after all that any of its threads wrote."""
    if arrived_ptr is not None:
        counter_ptr = arrived_ptr + pid % COPIES * LINE
        if INTERPRETED:
            tl.atomic_add(counter_ptr, 1, sem="release")
        else:
            tl.inline_asm_elementwise(
                """{
                .reg .pred first; .reg .b32 thread;
                bar.sync 0;
                mov.u32 thread, %tid.x;
                setp.eq.u32 first, thread, 0;
                @first red.release.gpu.global.add.u32 [$1], 1;
                mov.b32 $0, 0;
                }""",
                "=r,l", [counter_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
