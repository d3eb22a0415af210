"""A parameter on its way to the device, quantised where the model wants it so."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from pallas_kernels.quantized_matmul import quantize_weight
from sarathi_jax.models.model import scale_path
from sarathi_jax.weights.buffers import adopt
from sarathi_jax.weights.safetensors import WeightsError

Put = Callable[[str, np.ndarray], jax.Array]
"""Brings the values of a path to where they are served."""


def put_on_default_device(path: str, values: np.ndarray) -> jax.Array:
    """All of it on one device; `values` are given up."""
    del path
    return adopt(values)


def place(path: str, buffer: np.ndarray, quantized: Mapping[str, np.dtype], put: Put) -> dict[str, jax.Array]:
    """The parameter on the device, as one array or as 8-bit values and their scales.

    Args:
      path: of the parameter.
      buffer: its values, given up.
      quantized: what `ModelFunction.quantized` says.
      put: brings it there.

    Raises:
      WeightsError: values that cannot be quantised; names the parameter.
    """
    if path not in quantized:
        return {path: put(path, buffer)}
    try:
        values, scale = quantize_weight(buffer, quantized[path])
    except ValueError as error:
        raise WeightsError(f"parameter {path!r}: {error}") from error
    return {path: put(path, values), scale_path(path): put(scale_path(path), scale)}
