"""Logits to tokens, on the device, inside the compiled step: parameters are arrays, so no request ever recompiles."""

from sarathi_jax.sampling.logprobs import prompt_logprobs
from sarathi_jax.sampling.sampler import Drawn, first_argmax, is_argmax, sample
from sarathi_jax.sampling.table import SamplingParamsArrays, SamplingTable, check_vocabulary

__all__ = [
    "Drawn",
    "SamplingParamsArrays",
    "SamplingTable",
    "check_vocabulary",
    "first_argmax",
    "is_argmax",
    "prompt_logprobs",
    "sample",
]
