"""Products with 8-bit weights as XLA compiles them best on each platform."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.one_row import one_row_matmul


def matmul_w8(x: Array, weight: Array, scale: Array) -> Array:
    """bfloat16 activations; the weights are widened inside the product, where XLA fuses it (GPU, TPU)."""
    return _dot(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), jnp.float32) * scale


def matmul_w8a8(x: Array, weight: Array, scale: Array) -> Array:
    """int8 activations, one scale a row."""
    row_scale = jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0) / 127
    row_scale = jnp.where(row_scale > 0, row_scale, 1)
    values = jnp.round(x / row_scale).astype(jnp.int8)
    if x.shape[0] == 1:
        sums = lax.platform_dependent(values, weight, cpu=one_row_matmul, default=_integer_dot)
    else:
        sums = _integer_dot(values, weight)
    return sums * scale * row_scale


def _integer_dot(x: Array, weight: Array) -> Array:
    return _dot(x, weight, jnp.int32).astype(jnp.float32)


def _dot(x: Array, weight: Array, dtype: jax.typing.DTypeLike) -> Array:
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
