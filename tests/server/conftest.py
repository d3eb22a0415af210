"""The model that the servers of these tests serve."""

import pytest

from tests.engine.serving import Served, build


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Full attention, a tokenizer, a chat template."""
    return build("llama3.1", tmp_path_factory.mktemp("server"), token_buckets=(16,), num_blocks=256)
