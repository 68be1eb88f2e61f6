"""A `LanguageModelConfig` as transformers keeps one: in `config.json`, under `language_model`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from rodimus_lab.nn.model import LanguageModelConfig
from rodimus_lab.nn.zoo import with_official_cache
from rodimus_lab.registry import load_plugins


class RodimusLabConfig(PreTrainedConfig):
    """`language_model` is a `LanguageModelConfig` or its `to_dict()`.

    `fused_loss`: in training, a loss is worked out without the logits in memory, and the output has none.
    `official_cache_compat`: decode as the authors' published code does, defects and all. Raises `ConfigError` for a
    model that cannot be read.
    """

    model_type = "rodimus_lab"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers adds it to a list)

    def __init__(
        self,
        language_model: LanguageModelConfig | dict[str, Any] | None = None,
        *,
        fused_loss: bool = True,
        official_cache_compat: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ):
        if isinstance(language_model, dict):
            load_plugins()
            language_model = LanguageModelConfig.from_dict(language_model)
        self.language_model = None if language_model is None else language_model.to_dict()
        self.fused_loss, self.use_cache = fused_loss, use_cache
        self.official_cache_compat = official_cache_compat
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        # The head reads a tied embedding itself, so there is nothing for transformers to tie.
        super().__init__(**(kwargs | {"tie_word_embeddings": False}))

    def model_config(self) -> LanguageModelConfig:
        """The model, as this project describes it. Raises `ConfigError` where none was given."""
        load_plugins()
        config = LanguageModelConfig.from_dict(self.language_model or {})
        return with_official_cache(config) if self.official_cache_compat else config

    @property
    def vocab_size(self) -> int:
        return (self.language_model or {}).get("vocab_size", 0)

    @property
    def hidden_size(self) -> int:
        return (self.language_model or {}).get("d_model", 0)

    @property
    def num_hidden_layers(self) -> int:
        model = self.language_model or {"pattern": (), "repeats": 0}
        return len(model["pattern"]) * model["repeats"]


AutoConfig.register(RodimusLabConfig.model_type, RodimusLabConfig)
