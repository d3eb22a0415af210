"""Sampling where every device has the logits of its own part of the vocabulary."""

import jax
import jax.numpy as jnp
from jax import lax

from sarathi_jax.sampling import Drawn, SamplingParamsArrays, first_argmax, is_argmax, sample
from sarathi_jax.sampling.logprobs import no_logprobs


def gather_logits(logits: jax.Array, axis: str | None, vocab_size: int) -> jax.Array:
    """The logits of the whole vocabulary on every device.

    Args:
      logits: f32[S, V / devices], of consecutive tokens.
      axis: of the mesh; None: one device has them all.
      vocab_size: V; what lies beyond it is padding.
    """
    if axis is None:
        return logits
    with jax.named_scope("gather_logits"):
        return lax.all_gather(logits, axis, axis=1, tiled=True)[:, :vocab_size]


def sample_split(
    logits: jax.Array,
    axis: str | None,
    vocab_size: int,
    rows: jax.Array,
    positions: jax.Array,
    history: jax.Array,
    params: SamplingParamsArrays,
    active: jax.Array,
) -> Drawn:
    """As `sarathi_jax.sampling.sample`; where all rows are greedy, two numbers a row and device are exchanged.

    Args:
      logits, axis, vocab_size: as in `gather_logits`.
      rows, positions, history, params, active: as in `sample`.
    """

    if axis is None:
        return sample(logits, rows, positions, history, params, active)

    def greedy() -> Drawn:
        first = lax.axis_index(axis) * logits.shape[1]
        own = jnp.where(first + jnp.arange(logits.shape[1]) < vocab_size, logits, -jnp.inf)
        with jax.named_scope("gather_candidates"):
            best = lax.all_gather(own.max(1), axis, axis=1)
            tokens = lax.all_gather(first + first_argmax(own), axis, axis=1)
        # Of equal ones the first device's, which has the first token.
        drawn = jnp.take_along_axis(tokens, first_argmax(best)[:, None], 1)[:, 0]
        return Drawn(drawn, *no_logprobs(len(rows)))

    def any_other() -> Drawn:
        return sample(gather_logits(logits, axis, vocab_size), rows, positions, history, params, active)

    return lax.cond(is_argmax(rows, positions, params, active), greedy, any_other)
