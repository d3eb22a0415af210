"""Weights to 8 bits, on the host: a checkpoint larger than the device is quantised on its way there, by tensor."""

import ml_dtypes
import numpy as np

LARGEST = {np.dtype(np.int8): 127.0, np.dtype(ml_dtypes.float8_e4m3fn): 448.0}
"""What the largest weight of a channel becomes, by stored dtype."""

_PIECE_ELEMENTS = 1 << 24  # float32 copies are made of this much at a time


def quantize_weight(weight: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Quantises each output channel by itself, symmetrically, to the nearest value.

    Args:
      weight: [out..., in], any float dtype, finite.
      dtype: int8 or float8_e4m3fn.

    Returns:
      The stored values [out..., in] of `dtype` and f32[out...] scales: ``weight ~ values * scale[..., None]``.

    Raises:
      ValueError: another dtype, or weights that are not finite.
    """
    dtype = np.dtype(dtype)
    if dtype not in LARGEST:
        raise ValueError(f"weights cannot be quantised to {dtype}: only to {', '.join(map(str, LARGEST))}")
    flat = weight.reshape(-1, weight.shape[-1])
    values, scale = np.empty(flat.shape, dtype), np.empty(flat.shape[0], np.float32)
    step = max(1, _PIECE_ELEMENTS // max(1, flat.shape[1]))
    for start in range(0, flat.shape[0], step):
        rows = slice(start, start + step)
        piece = flat[rows].astype(np.float32)
        largest = np.abs(piece).max(axis=1, initial=0)
        if not np.isfinite(largest).all():
            raise ValueError("weights that are infinite or NaN cannot be quantised")
        scale[rows] = np.where(largest > 0, largest / LARGEST[dtype], 1)
        piece /= scale[rows, None]
        values[rows] = np.rint(piece) if dtype == np.int8 else piece
    return values.reshape(weight.shape), scale.reshape(weight.shape[:-1])
