"""A block made of hops (Eq. 13 of the paper, generalised).

A hop is a tuple of sublayers. Each reads a pre-norm of what came before it; the outputs inside a hop are added to a
local stream, and only the last sublayer's output is added to the residual stream:

    Transformer++   ((attention,), (feed_forward,))                two hops of one sublayer
    Rodimus         ((rodimus,),)                                   one hop
    Rodimus+        ((rodimus,), (attention, feed_forward))         the two-hop residual
    without it      ((rodimus,), (attention,), (feed_forward,))

Shapes: B batch, T time, D model width.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rodimus_lab.config import Config
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.norm import Norm, NormKind
from rodimus_lab.nn.recompute import recomputed
from rodimus_lab.ops.segments import Segments

Hop = Annotated[tuple[TokenMixerConfig, ...], Field(min_length=1)]


class BlockConfig(Config):
    """The sublayers of a block, hop by hop, and the norm before each."""

    hops: Annotated[tuple[Hop, ...], Field(min_length=1)]
    norm: NormKind = "rms"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5

    @property
    def sublayers(self) -> tuple[TokenMixerConfig, ...]:
        return tuple(sublayer for hop in self.hops for sublayer in hop)

    def num_params(self, d_model: int) -> int:
        return sum(s.num_params(d_model) + Norm.num_params(d_model, self.norm) for s in self.sublayers)

    def flops_per_token(self, d_model: int, context: int) -> int:
        return sum(s.flops_per_token(d_model, context) for s in self.sublayers)

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        return sum(s.state_bytes(d_model, batch, context, dtype) for s in self.sublayers)


class Block(nn.Module):
    """`BlockConfig` built at a width. Its state is the tuple of its sublayers' states.

    With `recompute`, training keeps less for the backward pass, see `nn/recompute.py`.
    """

    recompute = False

    def __init__(self, config: BlockConfig, d_model: int, dropout: float = 0.0):
        super().__init__()
        self.hop_lengths = tuple(len(hop) for hop in config.hops)
        self.mixers = nn.ModuleList([sublayer.build(d_model) for sublayer in config.sublayers])
        self.norms = nn.ModuleList([Norm(d_model, config.norm, config.norm_eps) for _ in config.sublayers])
        self.dropout = nn.Dropout(dropout)

    def init_weights(self, init: Initializer) -> None:
        for norm in self.norms:
            norm.reset_parameters()  # type: ignore[operator]
        for mixer in self.mixers:
            mixer.init_weights(init)  # type: ignore[operator]

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> tuple[State, ...]:
        return tuple(
            mixer.init_state(batch, context=context, device=device, dtype=dtype)  # type: ignore[operator]
            for mixer in self.mixers
        )

    def forward(
        self, x_BTD: Tensor, state: tuple[State, ...] | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, tuple[State, ...] | None]:
        if self.recompute and state is None and torch.is_grad_enabled():
            return recomputed(self._forward, x_BTD, None, segments, draws=self.dropout.p > 0)
        return self._forward(x_BTD, state, segments)

    def _forward(
        self, x_BTD: Tensor, state: tuple[State, ...] | None, segments: Segments | None
    ) -> tuple[Tensor, tuple[State, ...] | None]:
        new_states: list[State] = []
        index = 0
        for length in self.hop_lengths:
            local_BTD = x_BTD
            for step in range(length):
                mixer: TokenMixer = self.mixers[index]  # type: ignore[assignment]
                y_BTD, new_state = mixer(
                    self.norms[index](local_BTD), None if state is None else state[index], segments
                )
                base_BTD = x_BTD if step == length - 1 else local_BTD
                local_BTD = base_BTD + self.dropout(y_BTD)
                new_states.append(new_state)
                index += 1
            x_BTD = local_BTD
        return x_BTD, None if state is None else tuple(new_states)

    def step(self, x_BD: Tensor, state: tuple[State, ...]) -> Tensor:
        """`forward` of one token a row, without dropout; the state is overwritten. See `TokenMixer.step`."""
        index = 0
        for length in self.hop_lengths:
            local_BD = x_BD
            for step in range(length):
                mixer: TokenMixer = self.mixers[index]  # type: ignore[assignment]
                norm: Norm = self.norms[index]  # type: ignore[assignment]
                base_BD = x_BD if step == length - 1 else local_BD
                local_BD = mixer.step(local_BD, norm, base_BD, state[index])
                index += 1
            x_BD = local_BD
        return x_BD
