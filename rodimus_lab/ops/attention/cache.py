"""Keys and values of past tokens: a ring of slots, each row of the batch with its own count.

The token at position p of a document sits in slot p mod S. A cache grows when it is short of slots; a windowed one has
at most `window` of them and then forgets the oldest. Where a document's first tokens are kept for ever, as sinks, they
have slots of their own before the ring.

Shapes: B batch, T time, S slots, G key heads, J value heads, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rodimus_lab.ops.segments import Segments


class KVCache(NamedTuple):
    """`length_B`: tokens of the current document seen so far, in the cache or forgotten."""

    k_BSGK: Tensor
    v_BSJV: Tensor
    length_B: Tensor

    @property
    def positions_BS(self) -> Tensor:
        """Position of the token in each slot, the last before `length_B` that falls there; negative where empty."""
        return self.positions_beside(sinks=0)

    def positions_beside(self, sinks: int) -> Tensor:
        """`positions_BS` where the first `sinks` slots are not of the ring."""
        slot = torch.arange(self.k_BSGK.shape[1], device=self.length_B.device)
        last_B1 = self.length_B.unsqueeze(1) - 1
        ring = last_B1 - (last_B1 - slot) % max(len(slot) - sinks, 1)
        position = torch.where(slot < sinks, slot, ring)
        return position.masked_fill((position < slot) | (position > last_B1), -1)

    def append(
        self, k_BTGK: Tensor, v_BTJV: Tensor, segments: Segments | None, window: int | None, sinks: int = 0
    ) -> KVCache:
        """The cache after the new tokens; of packed documents only the last one's are kept."""
        batch, length = k_BTGK.shape[:2]
        device = k_BTGK.device
        if segments is None:
            base_B, added_B = self.length_B, torch.full((batch,), length, device=device)
        else:
            last_B1 = segments.documents_BT[:, -1:]
            added_B = (segments.valid_BT & (segments.documents_BT == last_B1)).sum(1)
            base_B = torch.where(last_B1.squeeze(1) == 0, self.length_B, 0)
        grown = KVCache(self.k_BSGK, self.v_BSJV, base_B + added_B)
        most = None if window is None else window + sinks
        if grown.k_BSGK.shape[1] != most:
            need = int(grown.length_B.max()) if batch else length
            grown = grown._resized(need if most is None else min(need, most))
        # Slots whose token is among the new ones take it; the others keep what they have.
        positions_BS = grown.positions_beside(sinks)
        source_BS = length - added_B.unsqueeze(1) + positions_BS - base_B.unsqueeze(1)
        is_new_BS11 = (positions_BS >= base_B.unsqueeze(1))[:, :, None, None]

        def merged(old: Tensor, new: Tensor) -> Tensor:
            index = source_BS.clamp(0, length - 1)[:, :, None, None].expand(-1, -1, *new.shape[2:])
            return torch.where(is_new_BS11, new.to(old.dtype).gather(1, index), old)

        return KVCache(merged(grown.k_BSGK, k_BTGK), merged(grown.v_BSJV, v_BTJV), grown.length_B)

    def _resized(self, slots: int) -> KVCache:
        extra = slots - self.k_BSGK.shape[1]
        if extra <= 0:
            return self
        return self._replace(
            k_BSGK=F.pad(self.k_BSGK, (0, 0, 0, 0, 0, extra)), v_BSJV=F.pad(self.v_BSJV, (0, 0, 0, 0, 0, extra))
        )
