"""A micro-batch's forward and backward pass, or a whole step, as a CUDA graph, so that the host's time for launching
it is spent once.

Shapes: B rows of a micro-batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Accumulate = Callable[..., Tensor]


class CapturedMicroBatch:
    """`accumulate(*micro_batch, scale)`, which adds to the parameters' gradients and returns a loss, captured.

    Two graphs over one pool of memory: the first micro-batch of a step writes the gradients, the others add to them.
    The gradients are tensors of the graphs and must not be replaced. What is captured has to have run before.
    """

    def __init__(
        self,
        accumulate: Accumulate,
        parameters: Sequence[nn.Parameter],
        *given: Tensor,
        several: bool,
    ):
        self._given = tuple(x.clone() for x in given)
        for parameter in parameters:
            parameter.grad = None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._losses: list[Tensor] = []
        for _ in range(1 + several):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._graphs[0].pool() if self._graphs else None):
                self._losses.append(accumulate(*self._given))
            self._graphs.append(graph)

    def __call__(self, index: int, *given: Tensor) -> Tensor:
        """The loss of micro-batch number `index` of its step, valid until the next call."""
        for mine, new in zip(self._given, given, strict=True):
            mine.copy_(new, non_blocking=True)
        which = min(index, 1)
        self._graphs[which].replay()
        return self._losses[which]


class CapturedStep:
    """`step(*given)`, which makes gradients, updates the weights and returns tensors, as one graph.

    It must find the parameters without gradients and make them itself. Capturing it does nothing yet.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], *given: Tensor):
        self._given = tuple(x.clone() for x in given)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = step(*self._given)

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What the step returns, valid until the next call."""
        for mine, new in zip(self._given, given, strict=True):
            mine.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._results
