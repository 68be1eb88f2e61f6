"""The attention sublayer: any head sharing, full or windowed, with or without rotary positions.

Shapes: B batch, T time, D model width, H query heads, G key heads, J value heads, K head width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rodimus_lab.config import ConfigError
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.mixer import Initializer, State, TokenMixer, TokenMixerConfig
from rodimus_lab.nn.norm import Norm, linear_of_step
from rodimus_lab.nn.rotary import rotary_frequency, rotary_table, rotate
from rodimus_lab.ops.attention import KVCache, attention, attention_step
from rodimus_lab.ops.segments import Segments
from rodimus_lab.ops.sequence import first_position

Positive = Annotated[int, Field(ge=1)]


class AttentionConfig(TokenMixerConfig):
    """`head_width` defaults to d_model / num_heads. `window` counts the keys a token sees, itself included.

    `window_convention="official"` reads `window` as the authors' code does, halved inside: window // 2 + 1 keys.
    """

    kind: ClassVar[str] = "attention"

    heads: HeadSharing
    head_width: Positive | None = None
    window: Positive | None = None
    window_convention: Literal["keys", "official"] = "keys"
    rotary_base: Annotated[float, Field(gt=0)] | None = 10000.0
    bias: bool = False

    @property
    def keys_in_window(self) -> int | None:
        if self.window is None or self.window_convention == "keys":
            return self.window
        return self.window // 2 + 1

    def width_of_head(self, d_model: int) -> int:
        """K at a model width. Raises `ConfigError` where the heads do not divide it or rotary positions lack pairs."""
        if self.head_width is None and d_model % self.heads.num_heads:
            raise ConfigError(
                f"d_model={d_model} is not a multiple of num_heads={self.heads.num_heads}; give head_width"
            )
        width = self.head_width or d_model // self.heads.num_heads
        if self.rotary_base is not None and width % 2:
            raise ConfigError(f"rotary positions need an even head_width, not {width}; or set rotary_base to null")
        return width

    def _widths(self, d_model: int) -> tuple[int, int, int]:
        width = self.width_of_head(d_model)
        heads = self.heads
        return heads.num_heads * width, heads.num_key_heads * width, heads.num_value_heads * width

    def build(self, d_model: int) -> Attention:
        return Attention(self, d_model)

    def num_params(self, d_model: int) -> int:
        q, k, v = self._widths(d_model)
        return d_model * (2 * q + k + v) + (q + k + v + d_model) * self.bias

    def flops_per_token(self, d_model: int, context: int) -> int:
        q, k, v = self._widths(d_model)
        reach = min(context, self.keys_in_window or context)
        return 2 * d_model * (2 * q + k + v) + 4 * q * reach

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        _, k, v = self._widths(d_model)
        slots = min(context, self.keys_in_window or context)
        return batch * (slots * (k + v) * dtype.itemsize + 8)


class Attention(TokenMixer):
    """See `AttentionConfig`. State: a `KVCache` of rotated keys and of values."""

    SPLITS_SEQUENCE = True

    def __init__(self, config: AttentionConfig, d_model: int):
        super().__init__()
        self.config = config
        self.head_width = config.width_of_head(d_model)
        self.widths = config._widths(d_model)
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=config.bias)
        self.out_proj = nn.Linear(self.widths[0], d_model, bias=config.bias)

    def init_weights(self, init: Initializer) -> None:
        init.linear(self.qkv_proj)
        init.linear(self.out_proj, writes_residual=True)

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        window = self.config.keys_in_window
        slots = min(context if context is not None else window or 0, window or context or 0)
        heads, weight = self.config.heads, self.qkv_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return KVCache(
            torch.zeros(batch, slots, heads.num_key_heads, self.head_width, device=device, dtype=dtype),
            torch.zeros(batch, slots, heads.num_value_heads, self.head_width, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.long),
        )

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        qkv = self.qkv_proj(x_BTD).split(self.widths, dim=-1)
        q_BTHK, k_BTGK, v_BTJK = (x.unflatten(-1, (-1, self.head_width)) for x in qkv)
        if self.config.rotary_base is not None:
            positions_BT = self._positions(x_BTD, state, segments)
            table = rotary_table(positions_BT, self.head_width, self.config.rotary_base, q_BTHK.dtype)
            q_BTHK, k_BTGK = rotate(q_BTHK, table), rotate(k_BTGK, table)
        o_BTHK, state = attention(
            q_BTHK, k_BTGK, v_BTJK, window=self.config.keys_in_window, cache=state, segments=segments
        )
        return self.out_proj(o_BTHK.flatten(-2)), state

    def step(self, x_BD: Tensor, norm: Norm, base_BD: Tensor, state: State) -> Tensor:
        qkv = linear_of_step(x_BD, self.qkv_proj, norm).split(self.widths, dim=-1)
        q_BHK, k_BGK, v_BJK = (x.unflatten(-1, (-1, self.head_width)) for x in qkv)
        base = self.config.rotary_base
        frequency_K = None if base is None else rotary_frequency(self.head_width, base, x_BD.device)
        o_BHK = attention_step(q_BHK, k_BGK, v_BJK, state, frequency_K=frequency_K)
        return linear_of_step(o_BHK.flatten(-2), self.out_proj, base_BE=base_BD)

    @staticmethod
    def _positions(x_BTD: Tensor, state: KVCache | None, segments: Segments | None) -> Tensor:
        batch, length = x_BTD.shape[:2]
        if segments is not None:
            offset_B = torch.zeros(batch, dtype=torch.long, device=x_BTD.device) if state is None else state.length_B
            return segments.positions_BT(offset_B)
        index_1T = first_position(length) + torch.arange(length, device=x_BTD.device).unsqueeze(0)
        return index_1T if state is None else index_1T + state.length_B.unsqueeze(1)
