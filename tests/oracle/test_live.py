"""Agreement with Hugging Face transformers, run live: ``make test-oracle``.

The oracle writes whole logits for every tiny model, and writes the models again with its own ``save_pretrained``; both
directories, and both after a save and load through Orbax, must give the same logits here.
"""

import dataclasses
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from sarathi_jax.llm import LLM
from sarathi_jax.weights.checkpoint import save_orbax
from tests.agreement import ENGINE, GREEDY, check_outputs, forward_error, longest_first
from tests.forward import PagedModel, load_model
from tests.golden_file import TOLERANCE, Expected, read_expected, read_golden
from tests.oracle.reference import VARIABLE, oracle_python, run_reference
from tests.tiny_models import NUM_DECODES, PROMPT_LENGTHS, TINY

MAX_LEN = max(PROMPT_LENGTHS) + NUM_DECODES + 1
CHUNK_SIZES = (1, 7, 16, 64)

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # the first test waits for the oracle
    pytest.mark.skipif(
        oracle_python() is None, reason=f"{VARIABLE} names no Python with torch and transformers: make test-oracle"
    ),
]


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Where the oracle's values and models lie."""

    root: Path

    def expected(self, name: str) -> list[Expected]:
        return read_expected(self.root / f"{name}.npz")

    def published(self, name: str) -> Path:
        return self.root / "published" / name

    def resaved(self, name: str) -> Path:
        return self.root / "resaved" / name


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        root = tmp_path_factory.mktemp("oracle")
        run_reference(list(TINY), root)
        return Oracle(root)
    # The first worker runs the oracle for all of them, in the folder that they share; the others wait.
    root = tmp_path_factory.getbasetemp().parent / "oracle"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            run_reference(list(TINY), root)
            (root / "done").touch()
    return Oracle(root)


@pytest.mark.parametrize("name", TINY)
def test_committed_values_are_what_the_oracle_says_now(oracle: Oracle, name: str):
    for committed, live in zip(read_golden(name), oracle.expected(name), strict=True):
        assert committed.tokens == live.tokens
        assert committed.error_of(live.logits) < TOLERANCE / 10


@pytest.mark.parametrize("name", TINY)
def test_files_written_by_transformers_load_alike(oracle: Oracle, name: str):
    config, params = load_model(oracle.published(name))
    resaved_config, resaved_params = load_model(oracle.resaved(name))
    assert resaved_config == config
    assert resaved_params.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(resaved_params[path], value, err_msg=path)


@pytest.mark.parametrize("name", TINY)
def test_every_logit_in_every_batch_and_chunk_size(oracle: Oracle, tmp_path: Path, name: str):
    config, params = load_model(oracle.resaved(name))
    model, expected = PagedModel(config, params, MAX_LEN), longest_first(oracle.expected(name))
    for num_texts in range(1, len(expected) + 1):
        for chunk_size in CHUNK_SIZES:
            error = forward_error(model, expected[:num_texts], chunk_size)
            assert error <= TOLERANCE, f"{num_texts} texts in chunks of {chunk_size}"
    save_orbax(tmp_path / "orbax", config, params)
    orbax_config, orbax_params = load_model(tmp_path / "orbax")
    assert orbax_config == config
    reloaded = model.with_params(orbax_params)
    for chunk_size in CHUNK_SIZES:
        assert forward_error(reloaded, expected, chunk_size) <= TOLERANCE, f"from Orbax, in chunks of {chunk_size}"


@pytest.mark.parametrize(
    ("name", "budget"),
    [(name, 16) for name in TINY]
    + [(name, budget) for name in ("mistral", "qwen2-yarn-mixed", "falcon-40b") for budget in (1, 7, 64)],
)
def test_engine_in_every_batch_size(oracle: Oracle, name: str, budget: int):
    """Steps of exactly `budget` tokens, prefill chunks filling what decodes leave."""
    expected = longest_first(oracle.expected(name))
    with LLM(oracle.resaved(name), **ENGINE, token_budget=budget, token_buckets=(budget,)) as llm:
        for num_requests in range(1, len(expected) + 1):
            part = expected[:num_requests]
            check_outputs(llm.generate([one.prompt for one in part], GREEDY, use_tqdm=False), part)
        assert llm.num_late_compiles == 0
