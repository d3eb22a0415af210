import numpy as np
import pytest

from sarathi_jax.training.ngram import KneserNey
from sarathi_jax.training.tokens import BOS_ID

VOCAB = 12


def documents(seed, count=30):
    """A second-order chain with some noise: what a trigram can learn and a smoothed unigram cannot."""
    draw = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        tokens = [3, 4]
        for _ in range(40):
            follow = 3 + (tokens[-1] * 2 + tokens[-2]) % (VOCAB - 3)
            tokens.append(int(draw.integers(3, VOCAB)) if draw.random() < 0.3 else follow)
        result.append(np.array([*tokens, 2]))
    return result


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_of_what_may_follow_sum_to_one(order):
    model = KneserNey.fit(documents(0), VOCAB, order, BOS_ID)
    for context in ([], [3], [3, 4], [5, 2], [11, 11, 11], [0, 0]):
        total = sum(model.probabilities([*context, token])[-1] for token in range(VOCAB) if token != BOS_ID)
        assert total == pytest.approx(1.0, abs=1e-9), (order, context)


def test_beats_add_one_and_lower_orders():
    train, held_out = documents(0), documents(1)
    counts = np.zeros((VOCAB, VOCAB, VOCAB))
    for document in train:
        padded = [BOS_ID, BOS_ID, *document]
        for a, b, c in zip(padded, padded[1:], padded[2:], strict=False):
            counts[a, b, c] += 1
    smoothed = (counts + 1) / (counts + 1).sum(axis=-1, keepdims=True)
    add_one = 0.0
    for document in held_out:
        padded = [BOS_ID, BOS_ID, *document]
        add_one -= sum(np.log2(smoothed[a, b, c]) for a, b, c in zip(padded, padded[1:], padded[2:], strict=False))
    bits = [KneserNey.fit(train, VOCAB, order, BOS_ID).bits(held_out) for order in (1, 2, 3)]
    assert bits[2] < add_one
    assert bits[2] < bits[1] < bits[0]


def test_lower_orders_count_neighbours_not_occurrences():
    # Token 5 is frequent but only ever follows 4; token 6 is rarer and follows many: in a new place 6 is likelier.
    train = [np.array([4, 5] * 20 + [7, 6, 8, 6, 9, 6, 10, 6, 3, 6, 2])]
    model = KneserNey.fit(train, VOCAB, 2, BOS_ID)
    assert model.probabilities([11, 6])[-1] > model.probabilities([11, 5])[-1]


def test_refuses_what_does_not_fit_its_keys():
    with pytest.raises(ValueError, match="64 bits"):
        KneserNey.fit([np.array([1])], 65536, 4, BOS_ID)
    with pytest.raises(ValueError, match="no documents"):
        KneserNey.fit([], VOCAB, 3, BOS_ID)
