"""Configs: frozen, strict, with one canonical JSON form and a hash of it.

`Config` is a flat typed record. `Variant` is the root of a family of configs chosen by a `kind` string, such as the
token mixers of a block; a subclass joins its family by declaring `kind`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rodimus_lab.errors import UserError


class ConfigError(UserError):
    """A config that cannot be read: an unknown key, a wrong type or a value out of range."""


class Config(BaseModel):
    """Immutable typed settings. Unknown keys and wrong types raise `ConfigError` naming the key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error)) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(explain(cls, error)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with `kind` first where this config is one of a family."""
        kind = getattr(self, "kind", None)
        values: dict[str, Any] = {} if kind is None else {"kind": kind}
        return values | {name: _plain(getattr(self, name)) for name in type(self).model_fields}

    def canonical_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def digest(self) -> str:
        """First 8 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:8]

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated like any other config."""
        return type(self)(**({name: getattr(self, name) for name in type(self).model_fields} | changes))


class Variant(Config):
    """Root of the families of configs that are told apart by `kind`."""

    kind: ClassVar[str]
    family: ClassVar[dict[str, type[Variant]]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Variant in cls.__bases__:
            cls.family = {}
        if "kind" in cls.__dict__:
            other = cls.family.setdefault(cls.kind, cls)
            if other is not cls and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"{other.__qualname__} and {cls.__qualname__} both claim the kind {cls.kind!r}")

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, values: Any, handler: Any) -> Any:
        if not isinstance(values, Mapping):
            return handler(values)
        own = cls.__dict__.get("kind")
        values = dict(values)
        kind = values.pop("kind", own)
        if kind is None:
            raise ValueError(f"'kind' is missing; one of {', '.join(sorted(cls.family))}")
        if kind == own:
            return handler(values)
        if not isinstance(kind, str) or kind not in cls.family:
            raise ValueError(f"unknown kind {kind!r}{did_you_mean(str(kind), cls.family)}")
        return cls.family[kind].model_validate(values)


def did_you_mean(name: str, known: Any) -> str:
    """The tail of a sentence about an unknown name: its nearest neighbour, then all the good ones."""
    names = sorted(set(known))
    return f"{nearest(name, names) or ';'} known: {', '.join(names)}"


def nearest(name: str, known: Any) -> str:
    """The tail of a sentence about an unknown name: its nearest neighbour, one that begins with it before others, and
    nothing where none is near."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=max(1, len(names)))
    close.sort(key=lambda one: not one.startswith(name))
    return f"; did you mean {close[0]!r}?" if close else ""


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """One sentence for the first thing that is wrong in `error`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        return f"{cls.__name__} has no key {where!r}{did_you_mean(name, cls.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = first.get("input")
    shown = f" (got {given!r})" if isinstance(given, bool | int | float | str | None) and where else ""
    return f"{cls.__name__}{'.' + where if where else ''}: {message}{shown}"


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
