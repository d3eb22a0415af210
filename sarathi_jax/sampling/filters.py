"""Which tokens a draw may choose: the thresholds of min-p, top-k and top-p, found without sorting the vocabulary."""

import jax
import jax.numpy as jnp
from jax import lax

# lax.top_k of this many is a fifth of the time of a bisection and serves nearly every nucleus of a trained model; the
# others take the bisection (docs/decisions/sampling.md has the figures).
NUM_CANDIDATES = 256


def threshold(scores: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The score that a token must reach to be drawn.

    The order is vLLM's: min-p, then top-k, then top-p over the mass that those two leave. Tokens that tie with the last
    one kept are kept too. The likeliest token always stays.

    Args:
      scores: f32[S, V] logits over temperature, less their row's maximum, so the best is 0.
      top_k: i32[S]; 0: all.
      top_p: f32[S]; 1 or more: all.
      min_p: f32[S]; 0: all.

    Returns:
      f32[S], at most 0; -inf where nothing is filtered.
    """
    floor = jnp.log(min_p)
    limits_count, limits_mass = (top_k > 0) & (top_k < scores.shape[1]), top_p < 1
    return lax.cond(
        jnp.any(limits_count | limits_mass),
        lambda: _nucleus(scores, jnp.where(limits_count, top_k, 0), jnp.where(limits_mass, top_p, 1), floor),
        lambda: floor,
    )


def cut(scores: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The largest value such that the tokens whose scores reach it weigh at least `target` together.

    Bisection over the integers that order as floats do: 31 passes of compare and add, exact, no sort.

    Args:
      scores: f32[S, V], at most 0.
      weights: f32[S, V], not negative.
      target: f32[S] or i32[S].

    Returns:
      f32[S]; -inf where all tokens together do not reach the target.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = high - ((high - low) >> 1)
        heavy = jnp.where(scores >= _float(middle)[:, None], weights, 0).sum(1) >= target
        return jnp.where(heavy, middle, low), jnp.where(heavy, high, middle - 1)

    least = _ordinal(jnp.full(len(target), -jnp.inf))
    return _float(lax.fori_loop(0, 31, halve, (least, jnp.zeros_like(least)))[0])


def _nucleus(scores: jax.Array, top_k: jax.Array, top_p: jax.Array, floor: jax.Array) -> jax.Array:
    """`threshold` for top_k (0: all) and top_p (1: all) above a floor: from the likeliest few, else by bisection."""
    best = lax.top_k(scores, min(NUM_CANDIDATES, scores.shape[1]))[0]
    num_best = best.shape[1]

    kth = jnp.take_along_axis(best, jnp.clip(top_k - 1, 0, num_best - 1)[:, None], 1)[:, 0]
    floor = jnp.maximum(floor, jnp.where(top_k > 0, kth, -jnp.inf))
    beyond = top_k > num_best
    floor = lax.cond(
        jnp.any(beyond),
        lambda: jnp.where(beyond, jnp.maximum(floor, cut(scores, jnp.ones_like(scores), top_k)), floor),
        lambda: floor,
    )

    weights = jnp.where(scores >= floor[:, None], jnp.exp(scores), 0)
    target = top_p * weights.sum(1)
    reached = jnp.cumsum(jnp.where(best >= floor[:, None], jnp.exp(best), 0), 1) >= target[:, None]
    last = jnp.take_along_axis(best, jnp.argmax(reached, 1)[:, None], 1)[:, 0]
    last = jnp.where(reached[:, -1], last, floor)
    beyond = (top_p < 1) & ~reached[:, -1] & (best[:, -1] >= floor)
    last = lax.cond(
        jnp.any(beyond),
        lambda: jnp.where(beyond, cut(scores, weights, target), last),
        lambda: last,
    )
    return jnp.where(top_p < 1, jnp.maximum(floor, last), floor)


def _ordinal(value: jax.Array) -> jax.Array:
    """The int32 image of float32 values: it orders as they do."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _float(ordinal: jax.Array) -> jax.Array:
    """The inverse of `_ordinal`."""
    return lax.bitcast_convert_type(ordinal ^ ((ordinal >> 31) & jnp.int32(0x7FFFFFFF)), jnp.float32)
