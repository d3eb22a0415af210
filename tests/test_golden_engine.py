"""The whole engine against the committed values of Hugging Face transformers: same greedy text, same probabilities."""

from pathlib import Path

import pytest

from sarathi_jax.llm import LLM
from sarathi_jax.weights.checkpoint import save_orbax
from tests.agreement import ENGINE, GREEDY, check_outputs
from tests.forward import load_model
from tests.golden_file import read_golden
from tests.tiny_models import write_tiny_model

# One of each published model type; the live test has every family, and tests/test_golden.py the models of all.
NAMES = [
    "mistral",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama3.1", "qwen2-yarn-mixed", "qwen3", "falcon-7b")),
]


@pytest.mark.parametrize("name", NAMES)
def test_eight_requests_at_once(tmp_path: Path, name: str):
    """Steps of at most 16 tokens, overlapped: prompts in chunks of many lengths among decodes."""
    expected = read_golden(name)
    with LLM(write_tiny_model(name, tmp_path), **ENGINE, token_budget=16, token_buckets=(16,)) as llm:
        outputs = llm.generate([one.prompt for one in expected], GREEDY, use_tqdm=False)
        assert llm.num_late_compiles == 0
    check_outputs(outputs, expected)


@pytest.mark.slow
def test_from_an_orbax_directory(tmp_path: Path):
    """Also one request after the other, so that a step's chunk is the whole budget."""
    config, params = load_model(write_tiny_model("falcon-40b", tmp_path / "published"))
    save_orbax(tmp_path / "orbax", config, params)
    expected = read_golden("falcon-40b")
    with LLM(tmp_path / "orbax", **ENGINE, token_budget=16, token_buckets=(16,)) as llm:
        outputs = [llm.generate(one.prompt, GREEDY, use_tqdm=False)[0] for one in expected]
    check_outputs(outputs, expected)
