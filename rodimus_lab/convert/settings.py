"""A foreign `config.json`, read key by key: what is missing, of the wrong type or beyond this zoo is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rodimus_lab.errors import UserError

MISSING: Any = object()


class Settings:
    """The values of one config, or of one of its parts; `where` names it in sentences."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, key: str, default: Any = MISSING) -> Any:
        """The value, or the default that the layout's own code has for it."""
        if key in self.values:
            return self.values[key]
        if default is MISSING:
            raise UserError(f"{self.where} has no {key!r}; it is not a config of that layout")
        return default

    def count(self, key: str, default: Any = MISSING) -> int:
        """A whole number above 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{key}={value!r} in {self.where} is no whole number above 0")
        return value

    def number(self, key: str, default: Any = MISSING) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{key}={value!r} in {self.where} is no number above 0")
        return value

    def flag(self, key: str, default: Any = MISSING) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{key}={value!r} in {self.where} is neither true nor false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Raises `UserError` unless the value is one of `allowed`, the first being the default."""
        if self.get(key, allowed[0]) not in allowed:
            self.refuse(key)

    def refuse(self, key: str) -> None:
        raise UserError(f"{key}={self.get(key)!r} in {self.where} is beyond this zoo's models; it is not converted")

    def part(self, key: str) -> Settings:
        """The object under a key, empty where there is none."""
        value = self.get(key, None) or {}
        if not isinstance(value, dict):
            raise UserError(f"{key} in {self.where} is no JSON object")
        return Settings(value, f"{key} of {self.where}")


def times(d_model: int, width: int) -> float:
    """The factor f with int(f * d_model) == width."""
    factor = width / d_model
    return factor if int(factor * d_model) == width else math.nextafter(factor, math.inf)
