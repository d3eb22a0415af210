"""Products with 8-bit weights: see `api`."""

from pallas_kernels.quantized_matmul import reference
from pallas_kernels.quantized_matmul.api import MODES, Mode, quantized_matmul
from pallas_kernels.quantized_matmul.quantize import quantize_weight

__all__ = ["MODES", "Mode", "quantize_weight", "quantized_matmul", "reference"]
