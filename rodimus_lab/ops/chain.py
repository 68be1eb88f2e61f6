"""The kernels of one decoding step as a chain, in which each waits for the one before it by a flag. Off by default.

`gdc_wait` (see launch.py) waits until the grid before has ended and its caches are flushed. In a chain a kernel has
counters instead, to which each of its programs adds 1 when it has written all it writes, and the next kernel begins to
compute as soon as they add up.

**A chain begins with clearing its counters**, in its own stream and memory. So they are right in every replay of a
CUDA graph, with several models taking turns, and after a step that was given up half-way: no count outlives a step.
Clearing is an ordinary operation, and so must be the next, which writes what the chain's first kernel reads. Such an
operation starts when all before it has ended, and no kernel of the chain starts before it has. So all of them find the
counters cleared, and what they read before they wait (weights, and a sublayer's state, once a step) in its place.

**What a kernel does after its wait comes after all that the kernels before it did**, by either way of waiting: by
`gdc_wait`, as the grid before has ended; by flag, as each program of the kernel before has come to its end; and in
both cases that one had waited in turn. Counting is a release and looking an acquire, for the whole device, and both
transitive. So what any earlier kernel wrote can be read, and what earlier kernels read (given back, and allocated
again by a later layer) can be written.

**No kernel waits for one that cannot run.** A kernel starts when every program of the one before has said
`gdc_launch_dependents` or ended. So the programs that it waits for are on the device, where nothing sends them away,
and what these wait for is so in turn, back to a kernel that waits for no flag. Without early starts all has ended.

Only the kernel launched just before is waited for by flag: a chain knows it by the tensor that it wrote, see `follow`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

FOLLOWERS = {"enter": {"narrow"}, "narrow": {"memory"}, "memory": {"linear"}, "linear": {"linear", "enter"}}
# The kernels that wait by flag. Not measured yet.
FLAGS: frozenset[str] = frozenset()
# In a chain these let the next kernel start as the first thing they do.
EARLY: frozenset[str] = frozenset()
# Counters of a kernel, at most 32: the more, the fewer programs add to the same one.
COPIES = 1
# Look without acquiring, which empties the nearest cache, until the count is complete.
RELAXED = False
KERNELS_OF_SUBLAYER = 4  # at most
LINE = 32  # int32 in a cache line; a line has one counter


class Link(NamedTuple):
    """What a kernel awaits, from how many programs, and what it counts in itself: int32 (COPIES, LINE) or None."""

    awaited: Tensor | None
    programs: int
    arrived: Tensor | None


UNLINKED = Link(None, 0, None)


class Chain:
    """Of at most `kernels` kernels, on the device of `x`; further ones use `gdc_wait`."""

    def __init__(self, x: Tensor, kernels: int):
        self._counters = list(x.new_zeros(kernels, COPIES, LINE, dtype=torch.int32))[::-1]
        self._last = UNLINKED
        self._written: Tensor | None = None

    def follow(self, name: str, reads: Tensor, writes: Tensor, programs: int) -> Link:
        """Link up the kernel `name`, about to be launched with so many programs.

        `reads` and `writes` are its main input and its output. It is taken to follow the chain's last kernel where it
        reads that very tensor: nothing else may be launched between the two. Otherwise it follows a stranger.
        """
        awaited = self._last.arrived if name in FLAGS and reads is self._written else None
        arrived = self._counters.pop() if self._counters and FOLLOWERS[name] & FLAGS else None
        link = Link(awaited, 0 if awaited is None else self._last.programs, arrived)
        self._last, self._written = Link(None, programs, arrived), writes
        return link


current: ContextVar[Chain | None] = ContextVar("current", default=None)


@contextmanager
def chained(x: Tensor, kernels: int) -> Iterator[None]:
    """Have the kernels launched inside make a chain, unless that is off.

    What the first of them reads must be written inside, by an ordinary operation; no state may be stepped twice.
    """
    if not (FLAGS or EARLY):
        yield
        return
    token = current.set(Chain(x, kernels))
    try:
        yield
    finally:
        current.reset(token)
