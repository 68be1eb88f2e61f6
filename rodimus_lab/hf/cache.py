"""A model's own state where transformers expects a cache of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rodimus_lab.errors import UserError
from rodimus_lab.nn.mixer import map_state
from rodimus_lab.nn.model import ModelState


class StateCache(Cache):
    """`state` of a batch that has read `seen` columns of tokens, padding included.

    Its memory is the state's: constant for recurrent models and for windows, growing for full attention. What has been
    forgotten cannot be had back, so `crop` raises `UserError`.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: ModelState, seen: int = 0):
        super().__init__(layers=[])
        self.state, self.seen = state, seen

    def __len__(self) -> int:
        return len(self.state.blocks)

    @property
    def batch_size(self) -> int:
        return self.state.length_B.shape[0]

    @property
    def is_initialized(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0, *_: Any) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.state, self.seen = map_state(torch.zeros_like, self.state), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = map_state(lambda x: x.index_select(0, indices.to(x.device)), self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = map_state(lambda x: x.repeat_interleave(repeats, 0), self.state)

    def crop(self, *_: Any) -> None:
        raise UserError("a recurrent state cannot go back to an earlier token; use a decoding that never drops one")

    def update(self, *_: Any, **__: Any) -> Any:
        raise UserError("a StateCache holds a state, not keys and values; only this project's models can use it")
