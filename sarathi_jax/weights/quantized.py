"""A parameter on its way to the device, quantised where the model wants it so."""

from collections.abc import Mapping

import jax
import numpy as np

from pallas_kernels.quantized_matmul import quantize_weight
from sarathi_jax.models.model import scale_path
from sarathi_jax.weights.buffers import adopt
from sarathi_jax.weights.safetensors import WeightsError


def place(path: str, buffer: np.ndarray, quantized: Mapping[str, np.dtype]) -> dict[str, jax.Array]:
    """The parameter on the default device, as one array or as 8-bit values and their scales.

    Args:
      path: of the parameter.
      buffer: its values, given up.
      quantized: what `ModelFunction.quantized` says.

    Raises:
      WeightsError: values that cannot be quantised; names the parameter.
    """
    if path not in quantized:
        return {path: adopt(buffer)}
    try:
        values, scale = quantize_weight(buffer, quantized[path])
    except ValueError as error:
        raise WeightsError(f"parameter {path!r}: {error}") from error
    return {path: adopt(values), scale_path(path): adopt(scale)}
