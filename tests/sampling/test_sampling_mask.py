"""The mask of a grammar: against the plain reference, beside rows without one, and with the vocabulary split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from sarathi_jax.parallel.logits import sample_split
from sarathi_jax.request import SamplingParams
from sarathi_jax.sampling import SamplingMirror, SamplingTable, is_argmax, sample, sampling_shapes
from tests.sampling.sampling_support import (
    Case,
    draw,
    draw_at_many_positions,
    mask_of,
    on_device,
    reference_probabilities,
    reference_scores,
)

V = 300
GREEDY = SamplingParams(temperature=0)


def random_logits(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=V) * 3).astype(np.float32)


masks = st.frozensets(st.integers(0, V - 1), min_size=1, max_size=30)
wishes = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 30.0]),
        "top_k": st.sampled_from([0, 1, 5, 280]),
        "top_p": st.sampled_from([1.0, 0.6]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "repetition_penalty": st.sampled_from([1.0, 1.4, 1e-30]),
        "frequency_penalty": st.sampled_from([0.0, 2.0]),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=4),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    fields=st.lists(wishes, min_size=8, max_size=8),
    allowed=st.lists(masks | st.none(), min_size=8, max_size=8),
    seed=st.integers(0, 1000),
)
def test_follows_the_reference(fields, allowed, seed):
    """Greedy rows take the best allowed token, random ones one that the filters keep of the allowed."""
    cases = [
        Case(random_logits(seed + i), SamplingParams(**fields[i]), (1, 2), (3, 3), seed=seed, allowed=allowed[i])
        for i in range(8)
    ]
    for token, case in zip(draw(cases).tokens, cases, strict=True):
        assert case.allowed is None or token in case.allowed
        if case.params.repetition_penalty == 1e-30:
            continue  # overflows float32: only the mask is certain
        scores = reference_scores(case)
        if case.params.is_greedy:
            assert scores[token] >= scores.max() - 1e-4 * max(1, abs(scores.max()))
        else:
            assert reference_probabilities(case, 1e-4)[token] > 0


def test_draws_are_distributed_as_among_the_allowed_alone():
    allowed = frozenset(range(0, V, 7))
    case = Case(random_logits(5), SamplingParams(top_p=0.9, top_k=20), allowed=allowed)
    counts = np.bincount(draw_at_many_positions(case, 1024), minlength=V)
    expected = reference_probabilities(case) * 1024
    frequent = expected >= 5
    assert counts[~(reference_probabilities(case, 1e-5) > 0)].sum() == 0
    statistic = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
    assert statistic <= frequent.sum() + 5 * np.sqrt(2 * frequent.sum())


@pytest.mark.parametrize("temperature", [0, 1])
def test_nothing_brings_an_excluded_token_back(temperature: float):
    logits = random_logits(0)
    logits[7] = 1e6
    pushed = SamplingParams(temperature=temperature, logit_bias={7: 100.0, 9: -100.0})
    hopeless = np.where(np.arange(V) == 9, -np.inf, logits).astype(np.float32)
    cases = [Case(each, pushed, allowed=frozenset({9})) for each in (logits, hopeless)]
    assert draw(cases).tokens.tolist() == [9, 9]


def test_rows_without_a_mask_draw_as_without_others():
    params = [GREEDY, SamplingParams(), SamplingParams(top_k=3), SamplingParams(temperature=0, logit_bias={5: 3.0})]
    cases = [Case(random_logits(i), each, seed=i) for i, each in enumerate(params)]
    masked = Case(random_logits(9), GREEDY, allowed=frozenset({1}))
    assert draw([*cases, masked]).tokens.tolist() == [*draw(cases).tokens, 1]


def test_a_row_without_a_sequence_that_asks_is_not_masked():
    """The mask of a row ends with the sequence that had it, though its bits stay."""
    table = SamplingTable(3, V)
    Case(random_logits(0), GREEDY, allowed=frozenset({1})).fill(table, 1)
    mirror = SamplingMirror(jnp.asarray)
    first = mirror.update(table.changes())
    assert np.asarray(first.is_masked).tolist() == [0, 1, 0]
    np.testing.assert_array_equal(first.allowed[1], mask_of(frozenset({1}), V))
    Case(random_logits(0), GREEDY).fill(table, 1)
    second = mirror.update(table.changes())
    assert np.asarray(second.is_masked).tolist() == [0, 0, 0]
    assert second.allowed is first.allowed, "the bits are not sent again"


def test_logprobs_are_of_the_raw_logits():
    case = Case(random_logits(2), SamplingParams(temperature=0, logprobs=2), allowed=frozenset({8}))
    bare = dataclasses.replace(case, allowed=None)
    masked, raw = draw([case]), draw([bare])
    np.testing.assert_array_equal(masked.top_ids, raw.top_ids)
    assert masked.logprobs[0] == pytest.approx(case.logits[8] - np.log(np.exp(case.logits).sum()), abs=1e-4)


def test_nothing_is_unpacked_unless_a_row_asks():
    """The bits are read in a branch of their own, inside that of steps which are no plain argmax."""

    def depths(jaxpr, depth=0):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "shift_right_arithmetic" and eqn.outvars[0].aval.ndim == 3:
                yield depth
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(value, "eqns"):
                    yield from depths(value, depth + (eqn.primitive.name == "cond"))

    numbers = jax.ShapeDtypeStruct((4,), jnp.int32)
    logits, history = jax.ShapeDtypeStruct((4, V), jnp.float32), jax.ShapeDtypeStruct((9, 16), jnp.int32)
    active = jax.ShapeDtypeStruct((4,), jnp.bool_)
    traced = jax.jit(sample).trace(logits, numbers, numbers, history, sampling_shapes(9, V), active)
    assert list(depths(traced.jaxpr)) == [3]


@pytest.mark.slow
def test_with_the_vocabulary_split():
    """Masked rows leave the branch that compares only each device's best token."""
    size, num_devices = 4, 2
    part = -(-V // num_devices)
    allowed = frozenset({3, 80, 299})
    cases = [Case(random_logits(i), GREEDY, allowed=allowed if i % 2 else None) for i in range(size)]
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("tp",))
    rows = jnp.arange(size, dtype=jnp.int32)
    positions, active = jnp.ones(size, jnp.int32), jnp.ones(size, bool)
    history = jnp.zeros((size, 4), jnp.int32)
    table = SamplingTable(size, V)
    for row, case in enumerate(cases):
        case.fill(table, row)
    arrays = on_device(table)
    everywhere = PartitionSpec()
    split = jax.jit(
        jax.shard_map(
            lambda logits, arrays: sample_split(logits, "tp", V, rows, positions, history, arrays, active).tokens,
            mesh=mesh,
            in_specs=(PartitionSpec(None, "tp"), everywhere),
            out_specs=everywhere,
            check_vma=False,
        )
    )
    logits = np.stack([case.logits for case in cases])
    padded = np.pad(logits, ((0, 0), (0, part * num_devices - V)), constant_values=1e9)
    tokens = np.asarray(split(jnp.asarray(padded), arrays)).tolist()
    assert tokens == [int(reference_scores(case).argmax()) for case in cases]
    assert not is_argmax(rows, positions, arrays, active)
    assert is_argmax(rows, positions, arrays, rows % 2 == 0)
