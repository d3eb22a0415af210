"""The specification, in numpy and float64."""

import ml_dtypes
import numpy as np


def quantized_matmul(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, *, mode: str) -> np.ndarray:
    """See `pallas_kernels.quantized_matmul.api`; f64[T, out]."""
    weight = weight.astype(np.float64)
    if mode == "w8":
        return x.astype(ml_dtypes.bfloat16).astype(np.float64) @ weight.T * scale
    row_scale = np.abs(x).max(axis=1, keepdims=True, initial=0).astype(np.float32) / np.float32(127)
    row_scale = np.where(row_scale > 0, row_scale, np.float32(1))
    values = np.rint(x.astype(np.float32) / row_scale).astype(np.float64)
    return values @ weight.T * scale * row_scale
