"""Channel mixers: feed-forward sublayers. They have no memory, so their state is the empty tuple.

Shapes: B batch, T time, D model width, F hidden width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.norm import Norm, linear_of_step
from rodimus_lab.ops.segments import Segments


class FeedForwardConfig(TokenMixerConfig):
    """`activation="swiglu"`: W_out(SiLU(x W_gate) * x W_up); `"gelu"`: W_out GELU(x W_up). `width` is F."""

    kind: ClassVar[str] = "feed_forward"

    width: Annotated[int, Field(ge=1)]
    activation: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = False

    @property
    def _inner(self) -> int:
        return self.width * (2 if self.activation == "swiglu" else 1)

    def build(self, d_model: int) -> FeedForward:
        return FeedForward(self, d_model)

    def num_params(self, d_model: int) -> int:
        return d_model * (self._inner + self.width) + (self._inner + d_model) * self.bias

    def flops_per_token(self, d_model: int, context: int) -> int:
        return 2 * d_model * (self._inner + self.width)

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return 0


class FeedForward(TokenMixer):
    """See `FeedForwardConfig`."""

    SPLITS_SEQUENCE = True

    def __init__(self, config: FeedForwardConfig, d_model: int):
        super().__init__()
        self.activation = config.activation
        self.in_proj = nn.Linear(d_model, config._inner, bias=config.bias)
        self.out_proj = nn.Linear(config.width, d_model, bias=config.bias)

    def init_weights(self, init: Initializer) -> None:
        init.linear(self.in_proj)
        init.linear(self.out_proj, writes_residual=True)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        return ()

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        h = self.in_proj(x_BTD)
        if self.activation == "swiglu":
            up_BTF, gate_BTF = h.chunk(2, dim=-1)
            h_BTF = F.silu(gate_BTF) * up_BTF
        else:
            h_BTF = F.gelu(h)
        return self.out_proj(h_BTF), state

    def step(self, x_BD: Tensor, norm: Norm, base_BD: Tensor, state: State) -> Tensor:
        h = linear_of_step(x_BD, self.in_proj, norm)
        gated = self.activation == "swiglu"
        return linear_of_step(h if gated else F.gelu(h), self.out_proj, gated=gated, base_BE=base_BD)
