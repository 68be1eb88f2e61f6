"""The language model with the two doors that TRL's losses go through: the body alone, and the head's weights.

TRL 1.16 works out log-likelihoods of the tokens that count from the last activations and the head, so that no logits of
a whole batch are in memory.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from rodimus_lab.hf.configuration import RodimusLabConfig
from rodimus_lab.hf.modeling import RodimusLabForCausalLM


class _Body:
    """The model without its head, as a call."""

    def __init__(self, model: RodimusLabForCausalLM):
        self._model = model

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **_: Any
    ) -> BaseModelOutputWithPast:
        x_BTD, _state = self._model._hidden(input_ids, attention_mask, None, None, use_cache, {})
        return BaseModelOutputWithPast(last_hidden_state=x_BTD)


class TrlModel(RodimusLabForCausalLM):
    """`RodimusLabForCausalLM` for TRL's trainers; its weights have the same names."""

    def __init__(self, config: RodimusLabConfig):
        super().__init__(config)
        self._body = _Body(self)

    @property
    def base_model(self) -> Any:
        """`last_hidden_state` (B, T, D) of input_ids and attention_mask (B, T)."""
        return self._body if hasattr(self, "_body") else self

    def get_output_embeddings(self) -> Any:
        """`weight` (V, D), the embedding's where it is tied, and `bias`."""
        return SimpleNamespace(weight=self.lm.head_weight_VD, bias=self.lm.head_bias)
