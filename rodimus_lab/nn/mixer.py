"""The seam between a model and what it is made of: `TokenMixer`, its config and its state.

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rodimus_lab.config import Variant
from rodimus_lab.errors import UserError
from rodimus_lab.nn.norm import Norm
from rodimus_lab.ops.segments import Segments

State = Any  # A NamedTuple of tensors that the mixer owns; () for a mixer without memory.


class Initializer(NamedTuple):
    """How a model draws its weights: `std` of linear and embedding weights, `out_scale` times that where a sublayer
    writes to the residual stream."""

    std: float = 0.02
    out_scale: float = 1.0

    def linear(self, layer: nn.Linear, *, writes_residual: bool = False) -> None:
        nn.init.normal_(layer.weight, std=self.std)
        if writes_residual:
            with torch.no_grad():
                layer.weight.mul_(self.out_scale)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class TokenMixer(nn.Module, ABC):
    """A sublayer: maps x_BTD to y_BTD, causally, with an explicit state.

    One `forward` serves training and scoring (no state in), prefill (a fresh state and T > 1) and decoding (T = 1).
    A class sets `SPLITS_SEQUENCE` where all that it does along time goes through operators that reach over to other
    ranks (`ops/sequence.py`).
    """

    SPLITS_SEQUENCE: ClassVar[bool] = False

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        """Mix along time. Returns the state after the last token where a state came in, else None."""

    @abstractmethod
    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token. `context` is the most tokens that it will have to remember: a cache that
        grows with the context is allocated to that size at once. Unless `dtype` says it for all, what is only kept is
        in the weights' dtype and what is added to at every token in at least float32: of a slow decay bfloat16 keeps
        nothing."""

    @abstractmethod
    def init_weights(self, init: Initializer) -> None:
        """Draw every parameter afresh."""

    def reset_buffers(self) -> None:
        """Give buffers that are not saved with the weights their value again, after a loader has left them empty."""

    def step(self, x_BD: Tensor, norm: Norm, base_BD: Tensor, state: State) -> Tensor:
        """base + mixer(norm(x)) for one token a row, without gradients; `state` becomes the state after it, in place.

        To be overridden where it can be done in fewer kernels. The state must have room for the token.
        """
        y_B1D, new_state = self(norm(x_BD).unsqueeze(1), state)
        overwrite(state, new_state)
        return base_BD + y_B1D.squeeze(1)


class TokenMixerConfig(Variant, ABC):
    """What a sublayer is, and what it costs, without building it."""

    @abstractmethod
    def build(self, d_model: int) -> TokenMixer:
        """The module, with undrawn weights."""

    @abstractmethod
    def num_params(self, d_model: int) -> int:
        """Number of learnable scalars."""

    @abstractmethod
    def flops_per_token(self, d_model: int, context: int) -> int:
        """Matrix-product and convolution FLOPs (a multiply-add is 2) of a forward decoding step on one token that has
        `context` - 1 tokens before it."""

    @abstractmethod
    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        """Bytes of the state tensors after `context` tokens."""


def overwrite(state: State, new_state: State) -> None:
    """Copy a state into the tensors of another. Raises `UserError` where it has outgrown them."""
    if not isinstance(state, Tensor):
        for part, new_part in zip(state, new_state, strict=True):
            overwrite(part, new_part)
    elif state.shape != new_state.shape:
        raise UserError("the text has outgrown the state it is kept in; allocate that for a longer context")
    elif state is not new_state:
        state.copy_(new_state)


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """A state of the same form, each tensor being `function` of the one before. Every tensor's first dimension is B."""
    if isinstance(state, Tensor):
        return function(state)
    parts = [map_state(function, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def clear(state: State) -> None:
    """Make a state that of before the first token, which is zeros, in place."""
    if isinstance(state, Tensor):
        state.zero_()
    else:
        for part in state:
            clear(part)


def state_nbytes(state: State) -> int:
    """Bytes held by the tensors of a state, however nested."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(state_nbytes(part) for part in state)
