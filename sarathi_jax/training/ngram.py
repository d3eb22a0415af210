"""Interpolated Kneser-Ney n-gram model over token ids: the baseline that the shipped checkpoint must beat.

Modified Kneser-Ney of Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1999),
section 3: three discounts an order, from the counts of counts, and every order interpolated with the next lower one.
Lower orders count the distinct left neighbours of an n-gram instead of its occurrences.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from sarathi_jax.training.tokens import TokenIds

_MAX_KEY = 2**63


@dataclasses.dataclass(frozen=True)
class _Order:
    """One order as sorted tables; n-grams and contexts are single integers in base `vocab_size`.

    Attributes:
      keys, discounted: seen n-grams, and their counts less the discount.
      contexts, totals, masses: contexts, the sum of their counts, and what the discounts took from them.
    """

    keys: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    masses: np.ndarray


@dataclasses.dataclass(frozen=True)
class KneserNey:
    """A fitted model. Documents are padded with begin tokens, which are never predicted."""

    vocab_size: int
    bos_id: int
    orders: tuple[_Order, ...]

    @classmethod
    def fit(cls, documents: Iterable[TokenIds], vocab_size: int, order: int, bos_id: int) -> "KneserNey":
        """Counts and discounts.

        Args:
          documents: token ids without the begin token, with the end token where the end is to be predicted.
          vocab_size: number of token ids.
          order: 3 for a trigram.
          bos_id: pads the context at the start of a document.

        Raises:
          ValueError: an n-gram does not fit into a 64-bit key, or there is nothing to count.
        """
        if vocab_size**order >= _MAX_KEY:
            raise ValueError(f"{order}-grams over {vocab_size} tokens do not fit into 64 bits: lower the order")
        grams = [_windows(document, order, bos_id) for document in documents if len(document)]
        if not grams:
            raise ValueError("no documents to count")
        keys, counts = np.unique(_keys(np.concatenate(grams), vocab_size), return_counts=True)
        orders = []
        for width in range(order, 0, -1):
            orders.append(_fit_order(keys, counts, vocab_size))
            # One distinct longer n-gram = one distinct left neighbour of its suffix.
            keys, counts = np.unique(keys % vocab_size ** (width - 1), return_counts=True)
        return cls(vocab_size, bos_id, tuple(reversed(orders)))

    def probabilities(self, document: TokenIds) -> np.ndarray:
        """Probability of every token of a document given those before it: f64[len(document)]."""
        order = len(self.orders)
        grams = _windows(document, order, self.bos_id)
        # The begin token is never predicted, so the lowest distribution is uniform over the others.
        result = np.full(len(grams), 1.0 / (self.vocab_size - 1))
        for width, tables in enumerate(self.orders, start=1):
            rows = grams[:, order - width :]
            mass = _look_up(tables.contexts, tables.masses, _keys(rows[:, :-1], self.vocab_size))
            total = _look_up(tables.contexts, tables.totals, _keys(rows[:, :-1], self.vocab_size))
            own = _look_up(tables.keys, tables.discounted, _keys(rows, self.vocab_size))
            seen = total > 0
            total = np.where(seen, total, 1.0)
            result = np.where(seen, (own + mass * result) / total, result)
        return result

    def bits(self, documents: Iterable[TokenIds]) -> float:
        """Bits that the model needs for all tokens of the documents."""
        return float(-sum(np.log2(self.probabilities(document)).sum() for document in documents if len(document)))


def _windows(document: TokenIds, order: int, bos_id: int) -> np.ndarray:
    padded = np.concatenate([np.full(order - 1, bos_id, np.int64), np.asarray(document, np.int64)])
    return np.lib.stride_tricks.sliding_window_view(padded, order)


def _keys(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    keys = np.zeros(len(rows), np.int64)
    for column in range(rows.shape[1]):
        keys = keys * vocab_size + rows[:, column]
    return keys


def _fit_order(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Order:
    discount = _discounts(counts)[np.minimum(counts, 3)]
    contexts, of = np.unique(keys // vocab_size, return_inverse=True)
    totals = np.bincount(of, weights=counts.astype(np.float64))
    masses = np.bincount(of, weights=discount)
    return _Order(keys, counts - discount, contexts, totals, masses)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discount of counts 0, 1, 2 and 3 or more; where a count of counts is empty (toy texts), half a count."""
    ones, twos, threes, fours = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if not (ones and twos and threes and fours):
        return np.array([0.0, 0.5, 0.5, 0.5])
    base = ones / (ones + 2 * twos)
    found = [1 - 2 * base * twos / ones, 2 - 3 * base * threes / twos, 3 - 4 * base * fours / threes]
    return np.array([0.0, *(float(np.clip(value, 0.0, n)) for n, value in enumerate(found, start=1))])


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)
