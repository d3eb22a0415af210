"""Held-out bits of a model, and of its n-gram baselines, over the same tokens."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from sarathi_jax.training.objective import Params
from sarathi_jax.training.tokens import BOS_ID, TokenIds

TokenLosses = Callable[[Params, jax.Array], jax.Array]

_BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How well held-out documents are predicted.

    Attributes:
      bits: for all tokens together, each counted once.
      nats_by_position: f64[length], mean loss at each position of the windows that a document fills.
    """

    bits: float
    nats_by_position: np.ndarray


def score(
    token_losses: TokenLosses, params: Params, documents: Iterable[TokenIds], length: int, stride: int
) -> HeldOut:
    """Scores every token of the documents, end tokens included.

    Windows of `length` tokens overlap, and a token counts in the first window that reaches it, so that all but the
    first tokens of a document are predicted from at least ``length - stride`` tokens.

    Args:
      token_losses: `Objective.token_losses`, compiled.
      params: of the model.
      documents: token ids without begin token; one is put in front.
      length: tokens of a window.
      stride: tokens between the starts of windows, at most `length`.
    """
    windows, counted, full = [], [], []
    for document in documents:
        tokens = np.concatenate([[BOS_ID], document]).astype(np.int32)
        reached = 1
        for start in range(0, len(tokens), stride):
            if reached >= len(tokens):
                break
            piece = tokens[start : start + length + 1]
            window = np.full(length + 1, BOS_ID, np.int32)
            window[: len(piece)] = piece
            targets = np.arange(start + 1, start + length + 1)
            windows.append(window)
            counted.append((targets >= reached) & (targets < len(tokens)))
            full.append(len(piece) == length + 1)
            reached = start + length + 1
    rows = max(1, _BATCH_TOKENS // length)
    # The last batch is filled up, so that one shape is compiled.
    filled = np.stack(windows + windows[:1] * (-len(windows) % rows))
    batches = [token_losses(params, jnp.asarray(filled[i : i + rows])) for i in range(0, len(filled), rows)]
    losses = np.concatenate(batches)[: len(windows)].astype(np.float64)
    by_position = losses[full].mean(axis=0) if any(full) else np.full(length, np.nan)
    return HeldOut(losses[np.stack(counted)].sum() / math.log(2), by_position)
