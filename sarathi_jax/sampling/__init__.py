"""Logits to tokens, on the device, inside the compiled step: parameters are arrays, so no request ever recompiles."""

from sarathi_jax.sampling.logprobs import prompt_logprobs
from sarathi_jax.sampling.sampler import Drawn, first_argmax, is_argmax, sample
from sarathi_jax.sampling.table import (
    SamplingMirror,
    SamplingParamsArrays,
    SamplingTable,
    sampling_shapes,
)

__all__ = [
    "Drawn",
    "SamplingMirror",
    "SamplingParamsArrays",
    "SamplingTable",
    "first_argmax",
    "is_argmax",
    "prompt_logprobs",
    "sample",
    "sampling_shapes",
]
