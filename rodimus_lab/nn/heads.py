"""How attention heads share keys and values, as data (Figure 3 of the paper)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rodimus_lab.config import Config, ConfigError, did_you_mean

Positive = Annotated[int, Field(ge=1)]
HeadKind = Literal["mha", "gqa", "mqa", "ska"]


class HeadSharing(Config):
    """Query head h reads key head h // (num_heads/num_key_heads), and likewise for values.

    MHA (H, H, H), GQA (H, G, G), MQA (H, 1, 1), the paper's shared-key attention SKA (H, 1, H).
    """

    num_heads: Positive
    num_key_heads: Positive
    num_value_heads: Positive

    @model_validator(mode="after")
    def _divides(self) -> HeadSharing:
        for name in ("num_key_heads", "num_value_heads"):
            if self.num_heads % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} does not divide num_heads={self.num_heads}")
        return self

    @classmethod
    def of(cls, kind: HeadKind, num_heads: int, groups: int | None = None) -> HeadSharing:
        """The sharing named `kind`; `groups` is GQA's number of key-value heads. Unknown names raise `ConfigError`."""
        sharings = {"mha": (num_heads, num_heads), "gqa": (groups, groups), "mqa": (1, 1), "ska": (1, num_heads)}
        if kind not in sharings:
            raise ConfigError(f"there is no head sharing {kind!r}{did_you_mean(kind, sharings)}")
        keys, values = sharings[kind]
        if keys is None or values is None:
            raise ConfigError("the head sharing 'gqa' needs its number of groups")
        return cls(num_heads=num_heads, num_key_heads=keys, num_value_heads=values)
