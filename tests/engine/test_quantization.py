"""What 8-bit weights cost: through the whole engine on the model that ships, and in the oracle models' logits."""

import pytest

from sarathi_jax.bench.quantization import compare
from sarathi_jax.config import QUANTIZATIONS
from tests.agreement import longest_first
from tests.forward import PagedModel, load_model
from tests.golden_file import read_golden
from tests.tiny_models import NUM_DECODES, PROMPT_LENGTHS, write_tiny_model

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


# Of any logit, as a share of the largest; rows of these models are only 64 numbers long: little averages out.
LARGEST_ERROR = {"w8": 0.05, "w8_fp8": 0.35, "w8a8": 0.08}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["mistral", "llama3.1", "qwen3", "falcon-7b", "falcon-40b"])
def test_logits_of_the_oracle_models(tmp_path, name, quantization):
    config, params = load_model(write_tiny_model(name, tmp_path), quantization)
    model = PagedModel(config, params, max(PROMPT_LENGTHS) + NUM_DECODES + 1, quantization=quantization)
    longest = longest_first(read_golden(name))[0]
    (logits,) = model.logits([longest.tokens], [longest.prompt_length], 64)
    error = longest.error_of(logits)
    print(f"{name} {quantization}: {100 * error:.2f} % of the logits' scale")
    assert error <= LARGEST_ERROR[quantization]
