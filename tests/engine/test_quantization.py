"""8-bit weights through the whole engine, on the model that ships."""

import pytest

from sarathi_jax.bench.quantization import compare
from sarathi_jax.config import QUANTIZATIONS

# On what the model writes itself; w8_fp8 keeps 4 bits of a weight where int8 keeps 8.
LEAST_SAME_TOP = {"w8": 0.98, "w8_fp8": 0.9, "w8a8": 0.98}


@pytest.mark.slow
def test_accuracy_of_the_model_that_ships():
    sizes = {"max_model_len": 512, "max_num_seqs": 4, "token_budget": 256, "token_buckets": (8, 256)}
    rows = compare(None, QUANTIZATIONS, max_tokens=1000, progress=False, **sizes)
    assert [row["quantization"] for row in rows] == list(QUANTIZATIONS)
    for row in rows:
        assert row["tokens"] >= 900
        assert row["same_top"] >= LEAST_SAME_TOP[row["quantization"]]
        assert abs(row["perplexity_ratio"] - 1) < 0.01
