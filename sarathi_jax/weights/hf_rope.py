"""Rotary embedding fields of ``config.json`` <-> `RopeConfig`, in the spellings before and since transformers 5."""

import math
from collections.abc import Mapping
from typing import Any

from sarathi_jax.config import ConfigError, RopeConfig
from sarathi_jax.weights.fields import count, flag, number

_ROPE_KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale"}
        | {"mscale_all_dim", "truncate"}
    ),
}


def rope_from_hf(fields: Mapping[str, Any], max_position: int) -> tuple[RopeConfig, int]:
    """Reads ``rope_theta`` with ``rope_scaling`` (old spelling) or ``rope_parameters`` (new).

    Args:
      fields: the whole ``config.json``.
      max_position: its ``max_position_embeddings``, in tokens.

    Returns:
      The rotary embedding and the context length in tokens, which ``yarn`` stretches.

    Raises:
      ConfigError: a method or a field that is not supported, or a malformed one.
    """
    merged = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    merged = {key: value for key, value in merged.items() if value is not None}
    if any(isinstance(value, Mapping) for value in merged.values()):
        raise ConfigError(f"rope_parameters={merged!r}: one set for all layers is supported, not one a layer type")
    theta = number(merged if "rope_theta" in merged else fields, "rope_theta", 10000.0)
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise ConfigError(f"rope scaling {kind!r} is not supported; supported: {', '.join(sorted(_ROPE_KEYS))}")
    if merged.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={merged['partial_rotary_factor']!r} is not supported (only 1.0)")
    neutral = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(set(merged) - _ROPE_KEYS[kind] - neutral)
    if unknown and kind != "default":
        raise ConfigError(f"rope scaling {kind!r} has fields that are not known: {', '.join(unknown)}")
    if kind == "default":
        return RopeConfig(theta=theta), max_position
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=number(merged, "factor")), max_position
    if kind == "llama3":
        rope = RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=number(merged, "factor"),
            original_max_position=count(merged, "original_max_position_embeddings"),
            low_freq_factor=number(merged, "low_freq_factor"),
            high_freq_factor=number(merged, "high_freq_factor"),
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise ConfigError(f"llama3 rope: high_freq_factor must exceed low_freq_factor, got {merged!r}")
        return rope, max_position
    original = count({"original_max_position_embeddings": max_position, **merged}, "original_max_position_embeddings")
    factor = max_position / original if merged.get("factor") is None else number(merged, "factor")
    rope = RopeConfig(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=number(merged, "beta_fast", 32.0),
        beta_slow=number(merged, "beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(merged, factor),
        truncate=flag(merged, "truncate", True),
    )
    return rope, max(max_position, int(original * factor))


def _yarn_attention_factor(fields: Mapping[str, Any], factor: float) -> float | None:
    """``attention_factor``, or the quotient that ``mscale`` and ``mscale_all_dim`` stand for (YaRN, section 3.4)."""
    if fields.get("attention_factor") is not None:
        return number(fields, "attention_factor")
    scales = [fields.get("mscale"), fields.get("mscale_all_dim")]
    if not any(scales):
        return None
    if not all(scales):
        raise ConfigError("yarn rope: mscale and mscale_all_dim are supported together, not one alone")
    over, under = (0.1 * number(fields, key) * math.log(max(factor, 1.0)) + 1 for key in ("mscale", "mscale_all_dim"))
    return over / under


def rope_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    """The ``rope_scaling`` field; the base is the field ``rope_theta`` beside it."""
    if rope.scaling is None:
        return None
    fields: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        fields["original_max_position_embeddings"] = rope.original_max_position
    if rope.scaling == "llama3":
        fields |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        fields |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            fields["attention_factor"] = rope.attention_factor
    return fields
