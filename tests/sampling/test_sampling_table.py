"""The host table: what reaches the device, and when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax.intake import check_vocabulary
from sarathi_jax.request import MAX_LOGIT_BIAS, RequestError, SamplingParams
from sarathi_jax.sampling import SamplingMirror, SamplingTable
from tests.sampling.sampling_support import Case, on_device

FULL = SamplingParams(
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
    min_tokens=4,
    logit_bias={3: 1.5, 9: -2.0},
    logprobs=0,
    prompt_logprobs=2,
)


def filled(params: SamplingParams = FULL) -> SamplingTable:
    table = SamplingTable(3, 100)
    case = Case(np.zeros(100), params, prompt=(1, 2, 3), seed=2**32 - 1, index=2, stop_token_ids=frozenset({7, 4}))
    table.set_row(1, case.sequence)
    return table


def test_row_holds_the_request():
    arrays = on_device(filled())
    values = {field.name: np.asarray(getattr(arrays, field.name))[1] for field in dataclasses.fields(arrays)}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert values[name] == np.float32(getattr(FULL, name))
    assert values["top_k"] == 5
    assert values["min_tokens"] == 4
    assert values["seed"] == 2**32 - 1
    assert values["sample_index"] == 2
    assert values["num_prompt"] == 3
    assert values["stop_ids"][:3].tolist() == [4, 7, -1]
    assert values["bias_ids"][:3].tolist() == [3, 9, -1]
    assert values["bias_values"][:3].tolist() == [1.5, -2.0, 0.0]
    assert values["wants_logprobs"] == 0
    assert values["wants_prompt_logprobs"] == 2


def test_other_and_cleared_rows_are_neutral():
    neutral, mirror = on_device(SamplingTable(3, 100)), SamplingMirror(jnp.asarray)
    table = filled()
    arrays = mirror.update(table.changes())
    for row in (0, 2):
        jax.tree.map(lambda a, b, row=row: np.testing.assert_array_equal(a[row], b[row]), arrays, neutral)
    table.clear_row(1)
    jax.tree.map(np.testing.assert_array_equal, mirror.update(table.changes()), neutral)


def test_arrays_are_kept_until_a_row_changes():
    table, mirror = filled(), SamplingMirror(jnp.asarray)
    first = mirror.update(table.changes())
    assert mirror.update(table.changes()) is first
    table.set_row(0, Case(np.zeros(100), SamplingParams(temperature=0)).sequence)
    assert mirror.update(table.changes()) is first, "a greedy request without wishes looks like a free row"
    table.set_row(0, Case(np.zeros(100), SamplingParams(temperature=1), seed=5).sequence)
    second = mirror.update(table.changes())
    assert second is not first
    assert second.bias_ids is first.bias_ids, "unchanged fields are not transferred again"


def test_changes_handed_out_never_change():
    table = filled()
    changes = table.changes()
    before = jax.tree.map(np.array, changes)
    for row in range(3):
        table.set_row(row, Case(np.zeros(100), SamplingParams(logit_bias={1: 2.0}), seed=row + 10).sequence)
    jax.tree.map(np.testing.assert_array_equal, changes, before)


def test_extreme_floats_stay_finite():
    extreme = SamplingParams(temperature=1e300, top_p=1e-300, repetition_penalty=1e-300)
    arrays = on_device(filled(extreme))
    for name in ("temperature", "top_p", "repetition_penalty"):
        value = float(getattr(arrays, name)[1])
        assert 0 < value < float("inf")


def test_a_full_logit_bias_fits():
    arrays = on_device(filled(SamplingParams(logit_bias={i: float(i % 100) for i in range(MAX_LOGIT_BIAS)})))
    assert np.asarray(arrays.bias_ids)[1].tolist() == list(range(MAX_LOGIT_BIAS))


def test_refusals():
    with pytest.raises(IndexError, match="row 3"):
        filled().clear_row(3)
    with pytest.raises(RequestError, match="logit_bias names token 100"):
        check_vocabulary(SamplingParams(logit_bias={100: 1.0}), 100)
    with pytest.raises(RequestError, match="stop_token_ids names token 101"):
        check_vocabulary(SamplingParams(stop_token_ids=[5, 101]), 100)
    check_vocabulary(FULL, 100)
