"""The model that the servers of these tests serve."""

import pytest

from tests.engine.serving import Served, build


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Full attention, a tokenizer, a chat template."""
    # Its own ends of text are letters of this tokenizer.
    changes = {"eos_token_id": 2}
    settings = {"token_buckets": (16, 64), "num_blocks": 256, "max_model_len": 512}
    return build("llama3.1", tmp_path_factory.mktemp("server"), changes=changes, **settings)
