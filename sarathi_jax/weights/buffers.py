"""Host memory that a CPU device adopts as an array without a second copy."""

import math

import jax
import numpy as np

_ALIGNMENT_BYTES = 64  # what XLA asks of a buffer that it adopts


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array to fill and then give to `adopt`."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def adopt(buffer: np.ndarray) -> jax.Array:
    """The filled buffer on the default device: on CPU the very same memory, elsewhere a copy, finished on return.

    The buffer is frozen, since whoever still wrote to it would change the array.
    """
    buffer.setflags(write=False)
    return jax.device_put(buffer).block_until_ready()
