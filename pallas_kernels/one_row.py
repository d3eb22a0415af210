"""One row times a matrix of narrow weights on a CPU: the product of a decode that is alone."""

import jax.numpy as jnp
from jax import Array, lax

_LANES = 32  # partial sums side by side: two of the widest vector registers
_MOST_TERMS = 24  # of a partial sum; every term is code, which costs compile time


def one_row_matmul(x: Array, weight: Array) -> Array:
    """``x @ weight.T`` in float32 as partial sums in vector lanes.

    XLA's own dot converts narrow weights at half the pace or less. Partial sums of int8 products are exact in float32.

    Args:
      x: [1, in] of the weight's dtype.
      weight: bfloat16 or int8 [out, in].

    Returns:
      f32[1, out].
    """
    out, width = weight.shape
    groups = width // _LANES
    terms = max((t for t in range(1, _MOST_TERMS + 1) if groups % t == 0), default=0)
    if width % _LANES or terms < 4:
        return _two_rows(x, weight)
    sums = groups // terms
    x = x.astype(jnp.float32).reshape(sums, terms, _LANES)
    weight = weight.reshape(out, sums, terms, _LANES)
    partial = sum(weight[:, :, t].astype(jnp.float32) * x[:, t] for t in range(terms))
    # The last sum as a product with ones; without the barrier XLA would fuse both into one slow loop.
    partial = lax.optimization_barrier(partial).reshape(out, sums * _LANES)
    return (partial @ jnp.ones((sums * _LANES, 1), jnp.float32)).T


def _two_rows(x: Array, weight: Array) -> Array:
    """A second row of zeros: a dot of one row is many times slower than one of two."""
    x = jnp.concatenate([x, jnp.zeros_like(x)])
    dtype = jnp.int32 if weight.dtype == jnp.int8 else jnp.float32
    out = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return out[:1].astype(jnp.float32)
