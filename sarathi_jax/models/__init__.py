"""Flax NNX models. Outside this package a model is a `ModelFunction` and a flat dict of arrays by dotted path."""

from sarathi_jax.models.layers import Attend, LayerState
from sarathi_jax.models.model import LanguageModel, ModelFunction

__all__ = ["Attend", "LanguageModel", "LayerState", "ModelFunction"]
