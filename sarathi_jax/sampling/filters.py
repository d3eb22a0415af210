"""The limit that min-p and top-k set to a draw, found without sorting the vocabulary."""

import jax
import jax.numpy as jnp
from jax import lax

# `lax.top_k` of this many costs a quarter of a bisection; a larger top-k takes the bisection.
_NUM_CANDIDATES = 256


def limit_of(scores: jax.Array, top_k: jax.Array, min_p: jax.Array) -> jax.Array:
    """The score that a token must reach to be drawn. Tokens that tie with the k-th are kept; the likeliest always is.

    Args:
      scores: f32[S, V] logits over temperature, less their row's maximum, so the best is 0.
      top_k: i32[S]; 0: all.
      min_p: f32[S]; 0: all.

    Returns:
      f32[S], at most 0; -inf where nothing is filtered.
    """
    vocab_size = scores.shape[1]
    num_candidates = min(_NUM_CANDIDATES, vocab_size)
    is_limited = (top_k > 0) & (top_k < vocab_size)
    is_large = is_limited & (top_k > num_candidates)

    def among_candidates():
        best = lax.top_k(scores, num_candidates)[0]
        return jnp.take_along_axis(best, jnp.clip(top_k - 1, 0, num_candidates - 1)[:, None], 1)[:, 0]

    no_limit = jnp.full(len(scores), -jnp.inf)
    small = lax.cond(jnp.any(is_limited & ~is_large), among_candidates, lambda: no_limit)
    large = lax.cond(jnp.any(is_large), lambda: kth_largest(scores, top_k), lambda: no_limit)
    limit = jnp.where(is_limited, jnp.where(is_large, large, small), -jnp.inf)
    return jnp.maximum(limit, jnp.log(min_p))


def kth_largest(scores: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest score of each row, repeated scores counted as often as they occur.

    Bisection over the integers that order as floats do: 31 passes of compare and count, exact, no sort.

    Args:
      scores: f32[S, V], at most 0.
      k: i32[S], from 1 to V.

    Returns:
      f32[S].
    """

    def halve(_, bounds):
        low, high = bounds
        middle = high - ((high - low) >> 1)
        enough = (scores >= _float(middle)[:, None]).sum(1, dtype=jnp.int32) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    least = _ordinal(jnp.full(len(k), -jnp.inf))
    return _float(lax.fori_loop(0, 31, halve, (least, jnp.zeros_like(least)))[0])


def next_above(value: jax.Array) -> jax.Array:
    """The least float32 above each value."""
    return _float(_ordinal(value) + 1)


def _ordinal(value: jax.Array) -> jax.Array:
    """The int32 image of float32 values: it orders as they do."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _float(ordinal: jax.Array) -> jax.Array:
    """The inverse of `_ordinal`."""
    return lax.bitcast_convert_type(ordinal ^ ((ordinal >> 31) & jnp.int32(0x7FFFFFFF)), jnp.float32)
