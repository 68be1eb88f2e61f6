"""This project's tokenizers, and the official checkpoints', as transformers' fast tokenizers."""

from __future__ import annotations

from inspect import signature
from typing import Any

import tokenizers as backends
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rodimus_lab.convert import CHAT_TEMPLATE
from rodimus_lab.data import Tokenizer
from rodimus_lab.hf.configuration import RodimusLabConfig

# The authors' chat format, as `CHAT_TEMPLATE` writes it, also from the roles of transformers' pipelines.
WITH_COMMON_ROLES = (
    "{%- set roles = {'user': 'HUMAN', 'assistant': 'ASSISTANT', 'system': 'SYSTEM'} %}"
    "{%- if system %}{{ '<role>SYSTEM</role>' + system }}{% endif %}"
    "{%- for message in messages %}"
    "{%- set role = roles.get(message['role'], message['role']) %}"
    "{%- if role not in ['HUMAN', 'ASSISTANT', 'OBSERVATION', 'SYSTEM'] %}"
    "{{ raise_exception('unknown role ' + role + '; known: HUMAN or user, ASSISTANT or assistant, OBSERVATION, "
    "SYSTEM or system') }}"
    "{%- elif role == 'SYSTEM' and (system or not loop.first) %}"
    "{{ raise_exception('a system message stands once, before all others') }}"
    "{%- endif %}"
    "{{ '<role>' + role + '</role>' + message['content'] }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)


class RodimusLabTokenizer(PreTrainedTokenizerFast):
    """Any `tokenizer.json`. Batches are padded on the left, so that the last column is every row's last token.

    In the authors' chat format the roles may be called user, assistant and system as well.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    @classmethod
    def of(cls, tokenizer: Tokenizer, **options: Any) -> RodimusLabTokenizer:
        """`tokenizer` itself; its end-of-document token ends and pads."""
        eos = tokenizer.token(tokenizer.eos_id)
        backend = backends.Tokenizer.from_str(tokenizer.to_json())
        return cls(tokenizer_object=backend, eos_token=eos, pad_token=eos, **options)

    def get_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """As transformers has it; the authors' format with the common roles beside its own."""
        template = super().get_chat_template(*args, **kwargs)
        return WITH_COMMON_ROLES if template == CHAT_TEMPLATE else template

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it; in the authors' format the answer's marker is added unless that is refused."""
        given = signature(super().apply_chat_template).bind(*args, **kwargs).arguments
        if "add_generation_prompt" not in given and not given.get("continue_final_message"):
            template = self.get_chat_template(given.get("chat_template"), given.get("tools"))
            kwargs["add_generation_prompt"] = template == WITH_COMMON_ROLES
        return super().apply_chat_template(*args, **kwargs)


AutoTokenizer.register(RodimusLabConfig, fast_tokenizer_class=RodimusLabTokenizer)
