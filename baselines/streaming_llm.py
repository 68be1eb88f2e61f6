"""StreamingLLM: attention over a window and a few sinks, the first tokens of the document (Xiao et al., 2024).

Positions are those inside the cache. A cache of S sinks and a window of W tokens is full at token S + W - 1, and from
then on the newest token stands there: it sees the window at its true distances and sink j at the distance
S + W - 1 - j, however much text has gone by. So token t turns its query by t for the window and by min(t, S + W - 1)
for the sinks, and keys turned once stay as they are.

The weights are Transformer++'s under the same names, so that one trained in full can be read with sinks and a window.

Shapes: B batch, T time, D model width, H query heads, G key heads, J value heads, K head width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rodimus_lab.nn.attention import Attention, AttentionConfig
from rodimus_lab.nn.heads import HeadSharing
from rodimus_lab.nn.mixer import State
from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.norm import Norm, linear_of_step
from rodimus_lab.nn.rotary import rotary_table, rotate
from rodimus_lab.nn.zoo import MODELS, Size
from rodimus_lab.ops.attention import KVCache, attention, sink_attention_step
from rodimus_lab.ops.segments import Segments

Positive = Annotated[int, Field(ge=1)]


class StreamingLLMConfig(AttentionConfig):
    """A cache of `sinks` and of `window` keys, the token's own included."""

    kind: ClassVar[str] = "streaming_llm"

    heads: HeadSharing = HeadSharing.of("mha", 8)
    window: Positive = 252
    sinks: Positive = 4

    @property
    def slots(self) -> int:
        return self.sinks + self.window

    def build(self, d_model: int) -> StreamingLLM:
        return StreamingLLM(self, d_model)

    def flops_per_token(self, d_model: int, context: int) -> int:
        # Queries are twice as wide where they turn.
        q, k, v = self._widths(d_model)
        return 2 * d_model * (2 * q + k + v) + (4 if self.rotary_base is None else 6) * q * min(context, self.slots)

    def state_bytes(self, d_model: int, batch: int, context: int, dtype: torch.dtype) -> int:
        _, k, v = self._widths(d_model)
        return batch * (min(context, self.slots) * (k + v) * dtype.itemsize + 8)


class StreamingLLM(Attention):
    """See the module's docstring and `StreamingLLMConfig`."""

    SPLITS_SEQUENCE = False

    config: StreamingLLMConfig

    def init_state(
        self, batch: int, *, context: int | None = None, device: Any = None, dtype: torch.dtype | None = None
    ) -> State:
        slots, heads, weight = self.config.slots, self.config.heads, self.qkv_proj.weight
        slots = slots if context is None else min(context, slots)
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
        positions_BT = self._positions(x_BTD, state, segments)
        q_BTHK, sink_q_BTHK, k_BTGK = self._turned(q_BTHK, k_BTGK, positions_BT)
        o_BTHK, state = attention(
            q_BTHK,
            k_BTGK,
            v_BTJK,
            window=self.config.window,
            sinks=self.config.sinks,
            sink_q_BTHK=None if self.config.rotary_base is None else sink_q_BTHK,
            cache=state,
            segments=segments,
        )
        return self.out_proj(o_BTHK.flatten(-2)), state

    def step(self, x_BD: Tensor, norm: Norm, base_BD: Tensor, state: State) -> Tensor:
        qkv = linear_of_step(x_BD, self.qkv_proj, norm).split(self.widths, dim=-1)
        q_BHK, k_BGK, v_BJK = (x.unflatten(-1, (-1, self.head_width)) for x in qkv)
        turned = self._turned(q_BHK.unsqueeze(1), k_BGK.unsqueeze(1), state.length_B.unsqueeze(1))
        q_BHK, sink_q_BHK, k_BGK = (x.squeeze(1) for x in turned)
        o_BHK = sink_attention_step(q_BHK, k_BGK, v_BJK, state, sinks=self.config.sinks, sink_q_BHK=sink_q_BHK)
        return linear_of_step(o_BHK.flatten(-2), self.out_proj, base_BE=base_BD)

    def _turned(self, q_BTHK: Tensor, k_BTGK: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries for the window, those for the sinks, and the keys."""
        base = self.config.rotary_base
        if base is None:
            return q_BTHK, q_BTHK, k_BTGK
        true, in_cache = (
            rotary_table(positions, self.head_width, base, q_BTHK.dtype)
            for positions in (positions_BT, positions_BT.clamp(max=self.config.slots - 1))
        )
        return rotate(q_BTHK, true), rotate(q_BTHK, in_cache), rotate(k_BTGK, true)


@MODELS.register("streaming_llm")
def streaming_llm(size: Size) -> LanguageModelConfig:
    """Transformer++ with a cache of half the training context, four of it sinks."""
    transformer_pp = MODELS["transformer++"](size)
    mixer = StreamingLLMConfig(heads=HeadSharing.of("mha", size.num_heads), window=max(1, size.context // 2 - 4))
    block = transformer_pp.pattern[0]
    return transformer_pp.replace(pattern=(block.replace(hops=((mixer,), *block.hops[1:])),))
