"""A barrier for all programs of a running kernel, which must all be on the device at once.

    token = arrive(barrier_ptr, programs)       what this program wrote before is done
    wait(barrier_ptr, token)                    what every program wrote before it arrived can be read

What a program does between the two it does while the others are late. The barrier is one int32 in memory that is 0
once, at its birth: each round adds 2^31 to it in all, so the highest bit turns when the last program arrives, however
often it is used, and no kernel has to reset it. One barrier serves one kernel at a time. The interpreter runs
programs one after another and cannot wait; there each phase of a kernel is a launch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(barrier_ptr, programs: tl.constexpr):
    share = tl.where(tl.program_id(0) == 0, 2147483648 - (programs - 1), 1).to(tl.int32)
    return tl.inline_asm_elementwise(
        """{
        .reg .pred first; .reg .b32 thread;
        bar.sync 0;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        mov.b32 $0, 0;
        @first atom.release.gpu.global.add.u32 $0, [$1], $2;
        }""",
        "=&r,l,r", [barrier_ptr.to(tl.int64), share], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def wait(barrier_ptr, token):
    """One thread looks; the CTA's own barrier hands what it has acquired to the others."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first, more; .reg .b32 thread, now;
        mov.u32 thread, %tid.x;
        setp.ne.u32 first, thread, 0;
        @first bra arrived;
        look:
        ld.acquire.gpu.global.b32 now, [$1];
        xor.b32 now, now, $2;
        setp.ge.s32 more, now, 0;
        @more bra look;
        arrived:
        bar.sync 0;
        mov.b32 $0, 0;
        }""",
        "=r,l,r", [barrier_ptr.to(tl.int64), token], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
