"""`LanguageModel` as transformers' models: loading, saving, `generate`, training.

Shapes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from rodimus_lab.errors import UserError
from rodimus_lab.hf.cache import StateCache
from rodimus_lab.hf.configuration import RodimusLabConfig
from rodimus_lab.nn.mixer import TokenMixer
from rodimus_lab.nn.model import IGNORE, LanguageModel
from rodimus_lab.ops.segments import Segments


class RodimusLabPreTrainedModel(PreTrainedModel):
    """What both classes share: the model, as `lm`, and how it is loaded, checkpointed and continued."""

    config_class = RodimusLabConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: RodimusLabConfig):
        super().__init__(config)
        self.lm = LanguageModel(config.model_config())
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As transformers has it, but of safetensors unless told otherwise, and strict.

        Raises `UserError` naming the weights that are missing, unknown or of another shape: none is drawn afresh.
        """
        options.setdefault("use_safetensors", True)
        options["ignore_mismatched_sizes"] = True  # Refused below, by name: transformers' own error has none.
        loaded: Any = super().from_pretrained(*arguments, output_loading_info=True, **options)
        model, facts = loaded
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in facts[fault]):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"the weights do not fit the config: {fault.replace('_', ' ')}, {names[0]}{more}")
        return (model, facts) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        # The model has drawn its weights and `from_pretrained` leaves none out; only what no file holds is left.
        if isinstance(module, TokenMixer):
            module.reset_buffers()

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.gradient_checkpointing = enable
        for block in self.lm.blocks:
            block.recompute = enable  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lm.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm.head = value  # type: ignore[assignment]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Embedding:
        """Refused unless nothing is to change: a vocabulary is part of the model's config."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise UserError(f"the vocabulary is {self.config.vocab_size} tokens; build or convert a model of another")
        return self.lm.embedding

    def _hidden(
        self,
        ids_BT: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: StateCache | None,
        use_cache: bool | None,
        refused: dict[str, Any],
    ) -> tuple[Tensor, StateCache | None]:
        if ids_BT is None or any(value is not None and value is not False for value in refused.values()):
            names = [name for name, value in refused.items() if value is not None and value is not False]
            raise UserError(f"{', '.join(names) or 'a call without input_ids'} is not supported; give input_ids")
        if cache is not None and not isinstance(cache, StateCache):
            raise UserError(f"a {type(cache).__name__} does not hold this model's state; leave past_key_values out")
        segments, right_padded = segments_of(ids_BT, attention_mask, position_ids if cache is None else None)
        if right_padded and (use_cache or cache is not None):
            raise UserError("text goes on at a row's end, where this batch has padding; set padding_side to 'left'")
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.training or right_padded)
        if cache is None and use_cache:
            cache = StateCache(self.lm.init_state(ids_BT.shape[0]))
        x_BTD, state = self.lm.hidden(ids_BT, None if cache is None else cache.state, segments)
        if cache is not None and state is not None:
            cache.state, cache.seen = state, cache.seen + ids_BT.shape[1]
        return x_BTD, cache


class RodimusLabModel(RodimusLabPreTrainedModel):
    """The final normalised activations, for `AutoModel`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """`last_hidden_state` (B, T, D) and the cache; see `RodimusLabForCausalLM.forward`."""
        refused = {
            "inputs_embeds": inputs_embeds,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        x_BTD, cache = self._hidden(input_ids, attention_mask, position_ids, past_key_values, use_cache, refused)
        output = BaseModelOutputWithPast(last_hidden_state=x_BTD, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()


class RodimusLabForCausalLM(RodimusLabPreTrainedModel, GenerationMixin):
    """The language model, for `AutoModelForCausalLM`, `generate`, `pipeline`, `Trainer` and PEFT."""

    accepts_loss_kwargs = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers has it, less the tokenizers that `generate` hands on where `stop_strings` needs them."""
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in ("tokenizer", "assistant_tokenizer")}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V) in float32 of the last `logits_to_keep` tokens (0: all), and the state after the last token.

        `attention_mask` (B, T or more, of which the last T count): 1 for a token, 0 for padding, which never changes a
        result; it may stand left, or without a cache right. `position_ids`, without a mask, tells packed documents
        apart: each begins at 0. `labels` (B, T) are the tokens themselves, -100 where not counted; the loss is their
        mean cross entropy in nats, or the sum over `num_items_in_batch`. Raises `UserError` for a mask with holes, for
        a cache of another model and for what is not supported.
        """
        refused = {
            "inputs_embeds": inputs_embeds,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        x_BTD, cache = self._hidden(input_ids, attention_mask, position_ids, past_key_values, use_cache, refused)
        loss, logits_BTV = None, None
        if labels is None or not (self.training and self.config.fused_loss):
            logits_BTV = self.lm.logits(x_BTD[:, -logits_to_keep:])
        if labels is not None:
            targets_BT = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
            if attention_mask is not None:
                here_BT = attention_mask[:, -labels.shape[1] :].bool()
                targets_BT = targets_BT.masked_fill(~(here_BT & F.pad(here_BT[:, 1:], (0, 1))), IGNORE)
            total = self.lm.loss_of_hidden(x_BTD, targets_BT, reduction="sum")
            count = (targets_BT != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / (count.to(total.device) if isinstance(count, Tensor) else count)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()


def segments_of(
    ids_BT: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Segments | None, bool]:
    """What mask and positions say of a batch, None where there is nothing to say, and whether a row ends in padding.

    Raises `UserError` for a mask of another shape or with padding between tokens.
    """
    if attention_mask is None:
        if position_ids is None or position_ids.shape != ids_BT.shape or not bool((position_ids[:, 1:] == 0).any()):
            return None, False
        return Segments((F.pad(position_ids[:, 1:] == 0, (1, 0))).long().cumsum(1)), False
    if attention_mask.ndim != 2 or attention_mask.shape[0] != len(ids_BT) or attention_mask.shape[1] < ids_BT.shape[1]:
        raise UserError(f"an attention mask of shape {tuple(attention_mask.shape)} does not fit the tokens; give B x T")
    mask_BT = attention_mask[:, -ids_BT.shape[1] :].bool()
    if bool(mask_BT.all()):
        return None, False
    begun_BT = mask_BT.long().cumsum(1) > 0
    after_BT = begun_BT & ~mask_BT
    if bool((after_BT[:, :-1] & mask_BT[:, 1:]).any()):
        raise UserError("the attention mask has padding between tokens; pad on the left, or without a cache right")
    # What fills a row up on the right is one more document.
    return Segments(begun_BT.long() - 1 + after_BT.long()), bool(after_BT.any())


AutoModel.register(RodimusLabConfig, RodimusLabModel)
AutoModelForCausalLM.register(RodimusLabConfig, RodimusLabForCausalLM)
