"""The model that the servers of these tests serve."""

from collections.abc import Iterator

import openai
import pytest

from tests.engine.serving import Served, build
from tests.server.processes import Process, serve, started


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Full attention, a tokenizer, a chat template."""
    # Its own ends of text are letters of this tokenizer.
    changes = {"eos_token_id": 2}
    settings = {"token_buckets": (16, 64), "num_blocks": 256, "max_model_len": 512}
    return build("llama3.1", tmp_path_factory.mktemp("server"), changes=changes, **settings)


@pytest.fixture(scope="session")
def server(tiny: Served) -> Iterator[Process]:
    """A process that serves it, with a key and short timeouts."""
    flags = ("--header_timeout_s=1", "--body_timeout_s=1", "--write_timeout_s=1", "--api_key=key", "--keep_alive_s=2")
    with started(serve(tiny.llm._path, *flags)) as process:
        yield process
        process.signal()
        assert process.wait() == 0


@pytest.fixture
def client(server: Process) -> Iterator[openai.OpenAI]:
    """OpenAI's own, of that process."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
        yield client
