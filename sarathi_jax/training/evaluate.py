"""Held-out bits of a model, and of its n-gram baselines, over the same tokens."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from sarathi_jax.training.objective import Params
from sarathi_jax.training.tokens import BOS_ID, TokenIds

TokenLosses = Callable[[Params, jax.Array], jax.Array]

_BATCH_TOKENS = 8192


def held_out_bits(
    token_losses: TokenLosses, params: Params, documents: Iterable[TokenIds], length: int, stride: int
) -> float:
    """Bits that the model needs for every token of the documents, end tokens included.

    Windows of `length` tokens overlap, and a token is scored in the first window that reaches it, so that all but the
    first tokens of a document are predicted from at least ``length - stride`` tokens.

    Args:
      token_losses: `Objective.token_losses`, compiled.
      params: of the model.
      documents: token ids without begin token; one is put in front.
      length: tokens of a window.
      stride: tokens between the starts of windows, at most `length`.
    """
    windows, weights = [], []
    for document in documents:
        tokens = np.concatenate([[BOS_ID], document]).astype(np.int32)
        scored = 1
        for start in range(0, len(tokens), stride):
            if scored >= len(tokens):
                break
            window = np.full(length + 1, BOS_ID, np.int32)
            piece = tokens[start : start + length + 1]
            window[: len(piece)] = piece
            targets = np.arange(start + 1, start + length + 1)
            windows.append(window)
            weights.append((targets >= scored) & (targets < len(tokens)))
            scored = start + length + 1
    rows = max(1, _BATCH_TOKENS // length)
    nats = 0.0
    for first in range(0, len(windows), rows):
        batch = np.zeros((rows, length + 1), np.int32)
        mask = np.zeros((rows, length), bool)
        count = len(windows[first : first + rows])
        batch[:count], mask[:count] = windows[first : first + rows], weights[first : first + rows]
        nats += float(np.asarray(token_losses(params, jnp.asarray(batch)))[mask].sum(dtype=np.float64))
    return nats / math.log(2)


def nats_by_position(
    token_losses: TokenLosses, params: Params, documents: Iterable[TokenIds], length: int
) -> np.ndarray:
    """Mean loss at each position of windows that start where a document starts or continues: f64[length].

    A context that is real shows as a curve that falls or stays level out to its end.
    """
    tokens = np.concatenate([np.concatenate([[BOS_ID], document]) for document in documents]).astype(np.int32)
    starts = range(0, len(tokens) - length, length // 2)
    total = np.zeros(length)
    for start in starts:
        window = jnp.asarray(tokens[None, start : start + length + 1])
        total += np.asarray(token_losses(params, window), np.float64)[0]
    return total / max(1, len(starts))
