"""Log-probabilities of drawn and of prompt tokens, and the lists of the likeliest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax.request import MAX_LOGPROBS, SamplingParams
from sarathi_jax.sampling import prompt_logprobs
from tests.sampling.sampling_support import Case, draw

V = 300


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_logprobs_are_of_the_raw_distribution():
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32) * 3
    wishes = [
        SamplingParams(logprobs=5, temperature=0.5, top_p=0.5, logit_bias={3: 100.0}),
        SamplingParams(logprobs=20, repetition_penalty=2.0, temperature=0),
        SamplingParams(logprobs=0, temperature=2.0),
        SamplingParams(temperature=0),
    ]
    drawn = draw([Case(logits, params, prompt=(int(logits.argmax()),)) for params in wishes])
    expected = log_softmax(logits)
    likeliest = np.argsort(-logits, kind="stable")[:MAX_LOGPROBS]
    assert drawn.tokens[0] == 3
    np.testing.assert_allclose(drawn.logprobs[:3], expected[drawn.tokens[:3]], rtol=1e-5)
    for i in (0, 1):
        np.testing.assert_array_equal(drawn.top_ids[i], likeliest)
        np.testing.assert_allclose(drawn.top_logprobs[i], expected[likeliest], rtol=1e-5)
    assert drawn.logprobs[3] == 0, "nobody asked"
    assert not drawn.top_ids[2:].any()
    assert not drawn.top_logprobs[2:].any()


def test_nothing_is_reported_when_nobody_asks():
    drawn = draw([Case(np.arange(V), SamplingParams())])
    assert not drawn.logprobs.any()
    assert not drawn.top_ids.any()
    assert not drawn.top_logprobs.any()


@functools.partial(jax.jit, static_argnames="wants")
def run(hidden, head, targets, wants):
    return prompt_logprobs(hidden, lambda rows: rows @ head, targets, jnp.asarray(wants))


@pytest.mark.parametrize("num_rows", [1, 150])
def test_prompt_logprobs(num_rows):
    generator = np.random.default_rng(num_rows)
    hidden = generator.normal(size=(num_rows, 8)).astype(np.float32)
    head = generator.normal(size=(8, V)).astype(np.float32)
    targets = generator.integers(0, V, num_rows)
    targets[1::3] = -1
    targets[64:128] = -1  # a whole block that nobody asks for
    logprobs, top_ids, top_logprobs = map(np.asarray, run(hidden, head, jnp.asarray(targets, jnp.int32), True))
    expected = log_softmax(hidden @ head)
    for i, target in enumerate(targets):
        if target < 0:
            assert logprobs[i] == 0
            assert not top_ids[i].any()
            assert not top_logprobs[i].any()
        else:
            np.testing.assert_allclose(logprobs[i], expected[i, target], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(top_logprobs[i], expected[i, top_ids[i]], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(top_logprobs[i], -np.sort(-expected[i])[:MAX_LOGPROBS], rtol=1e-4, atol=1e-5)


def test_prompt_logprobs_that_nobody_wants_are_zeros():
    results = run(np.ones((5, 8), np.float32), np.ones((8, V), np.float32), jnp.ones(5, jnp.int32), False)
    assert not any(np.asarray(result).any() for result in results)
