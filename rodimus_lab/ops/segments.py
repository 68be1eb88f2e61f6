"""Which document each token belongs to: left padding and packed documents.

Shapes: B batch, T time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """`ids_BT` (int64): -1 for padding, then 0, 1, 2, ... for the documents, never decreasing along T.

    Document 0 continues whatever state comes in; each later one starts from nothing. Padding therefore stands only at
    the left; what fills a row up on the right is one more document. The state that an operator returns is the last
    document's.
    """

    ids_BT: Tensor

    @classmethod
    def from_mask(cls, mask_BT: Tensor) -> Segments:
        """From an attention mask: 1 (or True) for a token, 0 for left padding."""
        return cls(mask_BT.long() - 1)

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device | str | None = None) -> Segments:
        """One packed row of documents with the given lengths."""
        counts = torch.tensor(lengths, device=device)
        return cls(torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)[None])

    @classmethod
    def after_ends(cls, ids_BT: Tensor, end_token: int) -> Segments:
        """Of packed token ids: a document ends with each `end_token`, and the next one begins after it."""
        ends_BT = (ids_BT == end_token).long()
        return cls(ends_BT.cumsum(1) - ends_BT)

    @property
    def valid_BT(self) -> Tensor:
        """True for tokens, False for padding."""
        return self.ids_BT >= 0

    @property
    def documents_BT(self) -> Tensor:
        """`ids_BT` with the padding counted to document 0."""
        return self.ids_BT.clamp(min=0)

    def positions_BT(self, offset_B: Tensor) -> Tensor:
        """Index of each token within its document; document 0 starts at `offset_B`. Padding gets any value >= 0."""
        documents = self.documents_BT
        length = documents.shape[1]
        index = torch.arange(length, device=documents.device).expand_as(documents)
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        first = torch.where(starts, index, 0).cummax(1).values
        padding = (~self.valid_BT).sum(1, keepdim=True)
        in_first = documents == 0
        return torch.where(in_first, (index - padding).clamp(min=0) + offset_B[:, None], index - first)
