"""Checked readers of one field of a configuration file."""

import math
from collections.abc import Mapping
from typing import Any

from sarathi_jax.config import ConfigError


def required(fields: Mapping[str, Any], key: str) -> Any:
    """The field, which must be there and not null."""
    if fields.get(key) is None:
        raise ConfigError(f"config.json lacks the field {key!r}")
    return fields[key]


def count(fields: Mapping[str, Any], key: str) -> int:
    """A field that must be a positive integer."""
    value = required(fields, key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{key}={value!r} must be a positive integer")
    return value


def number(fields: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A field that must be a positive finite number; without a default it must be there."""
    value = default if default is not None and fields.get(key) is None else required(fields, key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{key}={value!r} must be a positive number")
    return float(value)


def flag(fields: Mapping[str, Any], key: str, default: bool) -> bool:
    """A field that must be true or false; missing or null means the default."""
    value = default if fields.get(key) is None else fields[key]
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} must be true or false")
    return value
