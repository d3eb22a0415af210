"""One row times a matrix of narrow weights on a CPU: the product of a decode that is alone."""

import jax.numpy as jnp
from jax import Array, lax

_LANES = 32  # partial sums side by side: two of the widest vector registers
_MOST_FOLDS = 4  # consecutive runs of lanes that a term adds up
_MOST_TERMS = 24  # of a partial sum; every term is code, which costs compile time


def one_row_matmul(x: Array, weight: Array) -> Array:
    """``x @ weight.T`` in float32 as partial sums in vector lanes.

    XLA's own dot converts narrow weights at half the pace or less. Partial sums of int8 products are exact.

    Args:
      x: [1, in] of the weight's dtype; int8 from -127 on.
      weight: bfloat16 or int8 [out, in].

    Returns:
      f32[1, out].
    """
    out, width = weight.shape
    folds = next((n for n in range(_MOST_FOLDS, 0, -1) if width % (n * _LANES) == 0), 0)
    if width < 4 * _LANES or not folds:
        return _two_rows(x, weight)
    num_terms = width // (folds * _LANES)
    num_sums = -(-num_terms // _MOST_TERMS)
    ends = [num_terms * (i + 1) // num_sums for i in range(num_sums)]
    weight, x = weight.reshape(out, num_terms, -1), x.reshape(num_terms, -1)
    sums = [
        _partial_sum(x[start:end], weight[:, start:end], folds) for start, end in zip([0, *ends], ends, strict=False)
    ]
    # The last sum as a product with ones; without the barrier XLA would fuse everything into one slow loop.
    partial = sum(lax.optimization_barrier(sums))
    return (partial @ jnp.ones((_LANES, 1), jnp.float32)).T


def _partial_sum(x: Array, weight: Array, folds: int) -> Array:
    """f32[out, _LANES] of [terms, folds * _LANES] and [out, terms, folds * _LANES]."""
    # Two products of int8 fit int16, whose vectors hold twice as many.
    run, narrow, wide = (2, jnp.int16, jnp.int32) if weight.dtype == jnp.int8 else (1, jnp.float32, jnp.float32)
    x, num_terms, partial = x.astype(narrow), weight.shape[1], jnp.zeros((), wide)
    for start in range(0, num_terms, run):
        terms = range(start, min(start + run, num_terms))
        products = sum(weight[:, t].astype(narrow) * x[t] for t in terms)
        partial += sum(part.astype(wide) for part in jnp.split(products, folds, axis=1))
    return partial.astype(jnp.float32)


def _two_rows(x: Array, weight: Array) -> Array:
    """A second row of zeros: a dot of one row is many times slower than one of two."""
    x = jnp.concatenate([x, jnp.zeros_like(x)])
    dtype = jnp.int32 if weight.dtype == jnp.int8 else jnp.float32
    out = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return out[:1].astype(jnp.float32)
