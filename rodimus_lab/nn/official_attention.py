"""Attention that decodes as the authors' published code does, with the defects of its cache.

That cache has w = window // 2 slots, where a token sees w + 1 keys in training and prefill, and

- a prompt longer than w leaves its first w - 1 tokens and its last one in the slots, so that decoding sees the oldest
  tokens, not the newest, until w more have been generated;
- a text that reaches length w while decoding loses its first token and has an empty slot, whose key is zero and
  therefore seen, until w more have been generated.

Nothing else should decode like this: it is for whoever has to compare with numbers that were made so. Of its own
defects there remain the ones that depend on the batch: its rows here never know of one another.

Shapes: B batch, T time, D model width, H query heads, G key heads, J value heads, K head width, S = w slots.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor

from rodimus_lab.nn.attention import Attention, AttentionConfig
from rodimus_lab.nn.mixer import State, TokenMixer
from rodimus_lab.nn.norm import Norm
from rodimus_lab.nn.rotary import rotary_table, rotate
from rodimus_lab.ops.attention import KVCache, attention
from rodimus_lab.ops.attention.softmax import sdpa
from rodimus_lab.ops.segments import Segments


class OfficialAttentionConfig(AttentionConfig):
    """`AttentionConfig` whose window, in the official convention, is at least 2 wide."""

    kind: ClassVar[str] = "official_attention"

    @model_validator(mode="after")
    def _windowed(self) -> OfficialAttentionConfig:
        if self.window is None or self.window < 2 or self.window_convention != "official":
            raise ValueError("the official cache needs a window of at least 2 in the official convention")
        return self

    @property
    def slots(self) -> int:
        assert self.window is not None
        return self.window // 2

    def build(self, d_model: int) -> OfficialAttention:
        return OfficialAttention(self, d_model)

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        _, k, v = self._widths(d_model)
        return super().state_bytes(d_model, batch, context, dtype) + batch * self.slots * (k + v) * dtype.itemsize


class OfficialState(NamedTuple):
    """`true`: what a later part of a prompt has to see; `k_BSGK`, `v_BSJK`: what a decoding step sees."""

    true: KVCache
    k_BSGK: Tensor
    v_BSJK: Tensor


class OfficialAttention(Attention):
    """See the module's docstring. One token a row is a decoding step; several are a prompt, or a further part of it."""

    config: OfficialAttentionConfig

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        true = super().init_state(batch, context=context, device=device, dtype=dtype)
        slots = self.config.slots
        return OfficialState(true, *(x.new_zeros(batch, slots, *x.shape[2:]) for x in (true.k_BSGK, true.v_BSJV)))

    def forward(
        self, x_BTD: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State | None]:
        if state is None:
            return super().forward(x_BTD, None, segments)
        q_BTHK, k_BTGK, v_BTJK = (
            x.unflatten(-1, (-1, self.head_width)) for x in self.qkv_proj(x_BTD).split(self.widths, dim=-1)
        )
        if self.config.rotary_base is not None:
            positions_BT = self._positions(x_BTD, state.true, segments)
            table = rotary_table(positions_BT, self.head_width, self.config.rotary_base, q_BTHK.dtype)
            q_BTHK, k_BTGK = rotate(q_BTHK, table), rotate(k_BTGK, table)
        before_B, old = state.true.length_B, (state.k_BSGK, state.v_BSJK)
        if segments is not None:  # Of packed documents only the last one's are kept.
            goes_on_B = segments.documents_BT[:, -1] == 0
            before_B = torch.where(goes_on_B, before_B, 0)
            old = tuple(torch.where(goes_on_B[:, None, None, None], x, 0) for x in old)  # type: ignore[assignment]
        o_BTHK, true = attention(
            q_BTHK, k_BTGK, v_BTJK, window=self.config.keys_in_window, cache=state.true, segments=segments
        )
        assert true is not None
        decoding = x_BTD.shape[1] == 1
        k_BSGK, v_BSJK = (
            self._kept(x, new, before_B, true.length_B, decoding=decoding)
            for x, new in zip(old, (k_BTGK, v_BTJK), strict=True)
        )
        if decoding:
            slot = torch.arange(self.config.slots, device=x_BTD.device)
            mask_B1S = (slot < true.length_B.clamp(min=1).unsqueeze(1)).unsqueeze(1)
            k, v = k_BSGK.to(q_BTHK.dtype), v_BSJK.to(q_BTHK.dtype)
            o_BTHK = sdpa(q_BTHK, k, v, mask_B1S, self.head_width**-0.5, None)
        return self.out_proj(o_BTHK.flatten(-2)), OfficialState(true, k_BSGK, v_BSJK)

    def _kept(self, old_BSXK: Tensor, new_BTXK: Tensor, before_B: Tensor, after_B: Tensor, *, decoding: bool) -> Tensor:
        """The slots after the new tokens, at positions before <= p < after: the token at p takes slot min(p, S - 1).

        A decoding step moves the slots on by one first, where the last one is to be taken.
        """
        slots, length = self.config.slots, new_BTXK.shape[1]
        slot = torch.arange(slots, device=old_BSXK.device)
        if decoding:
            moves_B111 = ((before_B >= slots - 1) & (after_B > before_B))[:, None, None, None]
            old_BSXK = torch.where(moves_B111, old_BSXK.roll(-1, dims=1), old_BSXK)
        after_B1 = after_B.unsqueeze(1)
        position_BS = torch.where(slot < slots - 1, slot, (after_B1 - 1).clamp(min=slots - 1))
        taken_BS11 = ((position_BS >= before_B.unsqueeze(1)) & (position_BS < after_B1))[:, :, None, None]
        index_BS = (length - after_B1 + position_BS).clamp(0, length - 1)
        index = index_BS[:, :, None, None].expand(-1, -1, *new_BTXK.shape[2:])
        return torch.where(taken_BS11, new_BTXK.to(old_BSXK.dtype).gather(1, index), old_BSXK)

    def step(self, x_BD: Tensor, norm: Norm, base_BD: Tensor, state: State) -> Tensor:
        return TokenMixer.step(self, x_BD, norm, base_BD, state)
