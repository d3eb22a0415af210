"""Log-probabilities under the raw logits: of drawn tokens, of prompt tokens, and of the likeliest."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sarathi_jax.request import MAX_LOGPROBS

# Rows whose logits exist at once while prompt log-probabilities are computed: 33 MB for a vocabulary of 128k.
_ROWS_AT_ONCE = 64

type Logprobs = tuple[jax.Array, jax.Array, jax.Array]


def token_logprobs(logits: jax.Array, tokens: jax.Array, num_wanted: jax.Array) -> Logprobs:
    """Log-probability of a token of each row, and the row's likeliest tokens.

    Args:
      logits: f32[S, V], raw.
      tokens: i32[S].
      num_wanted: i32[S]; -1: nothing; 0: the token's own log-probability; more: the top list too.

    Returns:
      (f32[S], top ids i32[S, MAX_LOGPROBS], top log-probabilities f32[S, MAX_LOGPROBS]); zeros where not wanted. Lists
      are always MAX_LOGPROBS long, likeliest first, ids past the end of a smaller vocabulary are -1 (-inf).
    """

    def compute():
        mass = jax.nn.logsumexp(logits, 1)
        chosen = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0] - mass
        ids, values = lax.cond(jnp.any(num_wanted > 0), lambda: _top(logits, mass), lambda: _no_top(len(tokens)))
        wants_top = (num_wanted > 0)[:, None]
        return jnp.where(num_wanted >= 0, chosen, 0), jnp.where(wants_top, ids, 0), jnp.where(wants_top, values, 0)

    return lax.cond(jnp.any(num_wanted >= 0), compute, lambda: no_logprobs(len(tokens)))


def prompt_logprobs(
    hidden: jax.Array, head_fn: Callable[[jax.Array], jax.Array], targets: jax.Array, wants: jax.Array | bool
) -> Logprobs:
    """Log-probability of each target token under the logits of its position.

    Logits are computed for a block of rows at a time, and only for blocks that have a target.

    Args:
      hidden: [T, E] what the head takes.
      head_fn: [rows, E] -> [rows, V] logits.
      targets: i32[T] the token that follows each position; -1: not wanted.
      wants: whether any request of this step asks.

    Returns:
      (f32[T], top ids i32[T, MAX_LOGPROBS], top log-probabilities f32[T, MAX_LOGPROBS]), as `token_logprobs`; zeros
      where the target is -1, and everywhere unless `wants`.
    """
    num_rows = hidden.shape[0]
    block = min(_ROWS_AT_ONCE, num_rows)
    padding = -num_rows % block

    def block_logprobs(args):
        hidden, targets = args

        def compute():
            num_wanted = jnp.where(targets >= 0, MAX_LOGPROBS, -1)
            return token_logprobs(head_fn(hidden).astype(jnp.float32), jnp.maximum(targets, 0), num_wanted)

        return lax.cond(jnp.any(targets >= 0), compute, lambda: no_logprobs(block))

    def compute():
        blocks = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, block, hidden.shape[1])
        targets_of_blocks = jnp.pad(targets, (0, padding), constant_values=-1).reshape(-1, block)
        results = lax.map(block_logprobs, (blocks, targets_of_blocks))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_rows], results)

    return lax.cond(jnp.asarray(wants), compute, lambda: no_logprobs(num_rows))


def _top(logits: jax.Array, mass: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens of each row and their log-probabilities; lax.top_k beats 20 rounds of argmax tenfold."""
    num_ids = min(MAX_LOGPROBS, logits.shape[1])
    values, ids = lax.top_k(logits, num_ids)
    short = ((0, 0), (0, MAX_LOGPROBS - num_ids))
    return jnp.pad(ids, short, constant_values=-1), jnp.pad(values - mass[:, None], short, constant_values=-jnp.inf)


def _no_top(num_rows: int) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((num_rows, MAX_LOGPROBS), jnp.int32), jnp.zeros((num_rows, MAX_LOGPROBS), jnp.float32)


def no_logprobs(num_rows: int) -> Logprobs:
    """What `token_logprobs` gives to rows that want nothing."""
    return jnp.zeros(num_rows, jnp.float32), *_no_top(num_rows)
