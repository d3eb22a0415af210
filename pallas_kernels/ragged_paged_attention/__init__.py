"""Attention of mixed batches of prefill chunks and decodes over a paged KV cache."""

from pallas_kernels.ragged_paged_attention import reference
from pallas_kernels.ragged_paged_attention.api import BACKENDS, check_platform, ragged_paged_attention

__all__ = ["BACKENDS", "check_platform", "ragged_paged_attention", "reference"]
