"""`sample` against the plain reference of `sampling_support`: what is drawn, how often, and what it may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarathi_jax.request import SamplingParams
from sarathi_jax.sampling.filters import kth_largest
from tests.sampling.sampling_support import (
    Case,
    draw,
    draw_at_many_positions,
    reference_probabilities,
    reference_scores,
)

V = 300
NUM_POSITIONS = 1024

jit_kth_largest = jax.jit(kth_largest)


def random_logits(seed: int, vocab_size: int = V, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=vocab_size) * scale).astype(np.float32)


def check_distribution(tokens: np.ndarray, case: Case) -> None:
    """Chi-square over the tokens expected at least five times, the others in one class; none outside the support."""
    kept_at_most = reference_probabilities(case, 1e-5) > 0
    assert set(tokens) <= set(np.flatnonzero(kept_at_most)), "a token was drawn that the filters leave out"
    expected = reference_probabilities(case) * len(tokens)
    observed = np.bincount(tokens, minlength=len(expected))
    frequent = expected >= 5
    expected = np.append(expected[frequent], expected[~frequent].sum())
    observed = np.append(observed[frequent], observed[~frequent].sum())
    used = expected > 1
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    degrees = used.sum() - 1
    assert statistic <= degrees + 5 * np.sqrt(2 * degrees) + 10


filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.05, 0.5, 1.0, 3.0, 100.0]),
        "top_k": st.sampled_from([0, 1, 2, 40, 256, 257, 280, 299, 300, 5000]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.001, 0.1, 0.7, 1.0]),
    }
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(fields=filters, seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.1, 1.0, 4.0]))
def test_draws_follow_the_reference(fields, seed, scale):
    case = Case(random_logits(seed, scale=scale), SamplingParams(**fields), seed=seed)
    check_distribution(draw_at_many_positions(case, NUM_POSITIONS), case)


def test_ties_at_the_limit_are_kept():
    logits = np.full(V, -np.inf, np.float32)
    logits[:4] = [2.0, 1.0, 1.0, 0.0]
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.6)):
        tokens = draw_at_many_positions(Case(logits, params), NUM_POSITIONS)
        assert set(tokens) == {0, 1, 2}


adjustments = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8, 5.0]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.7, -0.3, 2.0]),
        "min_tokens": st.sampled_from([0, 3, 7]),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=4),
    }
)
tokens_of_few_kinds = st.lists(st.integers(0, 5) | st.integers(0, V - 1), max_size=7).map(tuple)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    fields=st.lists(adjustments, min_size=8, max_size=8),
    prompts=st.lists(tokens_of_few_kinds, min_size=8, max_size=8),
    outputs=st.lists(tokens_of_few_kinds, min_size=8, max_size=8),
    stops=st.frozensets(st.integers(0, V - 1), max_size=40),
    seed=st.integers(0, 1000),
)
def test_greedy_takes_the_best_of_the_adjusted_logits(fields, prompts, outputs, stops, seed):
    cases = []
    for i in range(8):
        logits = random_logits(seed + i)
        logits[:6] += 6  # likely tokens repeat, so that penalties decide
        params = SamplingParams(temperature=0, max_tokens=None, **fields[i])
        cases.append(Case(logits, params, (1, *prompts[i]), outputs[i], stop_token_ids=stops))
    for token, case in zip(draw(cases).tokens, cases, strict=True):
        scores = reference_scores(case)
        assert scores[token] >= scores.max() - 1e-4 * max(1, abs(scores.max()))


def test_penalties_and_bias_shape_the_distribution():
    # A prompt of one token, so that position 1 has no output; `draw_at_many_positions` has a history of zeros.
    params = SamplingParams(repetition_penalty=1.5, logit_bias={1: 2.0, 2: -100.0}, top_p=0.95)
    case = Case(random_logits(3), params)
    tokens = np.concatenate(
        [draw([dataclasses.replace(case, seed=8 * i + j) for j in range(8)]).tokens for i in range(64)]
    )
    check_distribution(tokens, case)


def test_logit_bias_of_100_decides():
    logits = random_logits(0, scale=1)
    likeliest, other = int(logits.argmax()), int(logits.argmin())
    forced = Case(logits, SamplingParams(logit_bias={other: 100.0}))
    banned = Case(logits, SamplingParams(temperature=0, logit_bias={likeliest: -100.0}))
    tokens = draw([forced, banned]).tokens
    assert tokens[0] == other
    assert tokens[1] != likeliest


def test_stop_tokens_are_banned_until_min_tokens():
    logits = random_logits(1)
    logits[[4, 9]] = 50, 40
    case = Case(logits, SamplingParams(temperature=0, min_tokens=2), (1, 2), stop_token_ids=frozenset({4, 9}))
    drawn = draw([dataclasses.replace(case, output=(3,) * num_output) for num_output in range(4)]).tokens
    assert not set(drawn[:2]) & {4, 9}
    assert set(drawn[2:]) == {4}


def crowd() -> list[Case]:
    """Eight different wishes."""
    wishes = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, top_p=0.6),
        SamplingParams(temperature=5.0, top_p=0.95, logprobs=3),
        SamplingParams(top_k=7, logprobs=0),
        SamplingParams(temperature=2.0, top_k=270, top_p=0.8),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5),
        SamplingParams(min_p=0.05, min_tokens=9, logit_bias={5: 3.0}),
        SamplingParams(temperature=0, presence_penalty=1.0, logprobs=20),
    ]
    return [
        Case(random_logits(i), params, prompt=(1, 2, i), output=(5, 5, i), seed=i, stop_token_ids=frozenset({3}))
        for i, params in enumerate(wishes)
    ]


@pytest.mark.slow
def test_a_row_alone_is_the_row_in_any_crowd():
    cases = crowd()
    together = draw(cases)
    order = [3, 6, 0, 7, 1, 5, 2, 4]
    shuffled = draw([cases[i] for i in order], rows=[9, 2, 4, 0, 6, 1, 8, 3])
    for i, case in enumerate(cases):
        alone = draw([case], rows=[i], size=1)
        for field in dataclasses.fields(together):
            expected = getattr(alone, field.name)[0]
            np.testing.assert_array_equal(getattr(together, field.name)[i], expected)
            np.testing.assert_array_equal(getattr(shuffled, field.name)[order.index(i)], expected)


def test_draws_repeat_with_the_seed_and_differ_otherwise():
    case = Case(random_logits(0, scale=0.5), SamplingParams(), seed=7)
    tokens = draw_at_many_positions(case, NUM_POSITIONS)
    np.testing.assert_array_equal(draw_at_many_positions(case, NUM_POSITIONS), tokens)
    for other in (dataclasses.replace(case, seed=8), dataclasses.replace(case, index=1)):
        others = draw_at_many_positions(other, NUM_POSITIONS)
        check_distribution(others, other)
        assert (others == tokens).mean() < 0.05, "other seeds and samples are independent"
    assert (tokens[1:] == tokens[:-1]).mean() < 0.05, "neighbouring positions are independent"


def test_draws_do_not_depend_on_where_the_sequence_runs():
    """After a preemption the sequence has the same history in another row."""
    case = crowd()[5]
    assert draw([case], rows=[2]).tokens[0] == draw([case], rows=[9]).tokens[0]


def test_greedy_ignores_the_seed_and_takes_the_first_of_equals():
    logits = np.zeros(V, np.float32)
    logits[[17, 40, 250]] = 1
    cases = [Case(logits, SamplingParams(temperature=0), seed=seed, index=seed) for seed in range(8)]
    assert draw(cases).tokens.tolist() == [17] * 8


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-10, 1e300])
def test_extreme_temperatures(temperature):
    logits = random_logits(0)
    tokens = draw_at_many_positions(Case(logits, SamplingParams(temperature=temperature)), NUM_POSITIONS)
    if temperature < 1:
        assert set(tokens) == {logits.argmax()}
    else:
        assert len(set(tokens)) > 280


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_k=3, top_p=0.5, min_p=0.1),
        SamplingParams(top_k=290, top_p=1e-300),
    ],
)
def test_hopeless_logits_give_a_token_of_the_vocabulary(params):
    one_left = np.full(V, -np.inf)
    one_left[123] = -5.0
    rows = [
        np.full(V, np.nan),
        np.full(V, -np.inf),
        np.full(V, np.inf),
        np.where(np.arange(V) % 2, np.nan, 1),
        one_left,
    ]
    tokens = draw([Case(row, params) for row in rows]).tokens
    assert ((tokens >= 0) & (tokens < V)).all()
    assert tokens[4] == 123


@pytest.mark.slow
def test_a_vocabulary_of_three():
    case = Case(np.array([0.0, 1.0, 2.0]), SamplingParams(top_k=2, logprobs=2), prompt=(0,))
    drawn = draw([case], size=1)
    assert set(drawn.tokens) <= {1, 2}
    assert drawn.top_ids[0, :4].tolist() == [2, 1, 0, -1]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), ks=st.lists(st.integers(1, 50), min_size=4, max_size=4))
def test_kth_largest_is_exact(seed, ks):
    generator = np.random.default_rng(seed)
    scores = -np.abs(np.round(generator.normal(size=(4, 50)) * 10.0 ** generator.integers(-3, 4), 2)).astype(np.float32)
    scores[0, ::3] = -np.inf
    scores -= scores.max(1, keepdims=True)
    expected = -np.sort(-scores, axis=1)[np.arange(4), np.array(ks) - 1]
    np.testing.assert_array_equal(jit_kth_largest(jnp.asarray(scores), jnp.asarray(ks, jnp.int32)), expected)


@pytest.mark.slow
def test_distribution_over_a_large_vocabulary():
    for params in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=1000, min_p=1e-4)):
        case = Case(random_logits(5, 32000), params, seed=1)
        check_distribution(draw_at_many_positions(case, 512), case)
