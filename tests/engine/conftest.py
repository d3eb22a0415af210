"""Compiled models, one of each kind for the whole run, and the count of excused differences."""

import warnings
from collections.abc import Iterator

import pytest

from tests.engine.serving import Parity, Served, build


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Full attention, three buckets, a tokenizer, three end-of-text tokens."""
    return build("llama3.1", tmp_path_factory.mktemp("decoder"), token_buckets=(4, 16, 64))


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Every layer sees 24 tokens."""
    return build("mistral", tmp_path_factory.mktemp("windowed"))


@pytest.fixture(scope="session")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Parallel attention, one KV head, no tokenizer."""
    return build("falcon-7b", tmp_path_factory.mktemp("falcon"), with_tokenizer=False)


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The one with windows, in bfloat16."""
    return build("mistral", tmp_path_factory.mktemp("half"), dtype="bfloat16")


@pytest.fixture
def parity(record_property) -> Iterator[Parity]:
    """Counts compared tokens and excused differences into the report; a warning shows every excuse."""
    counts = Parity()
    yield counts
    record_property("parity_tokens", counts.num_tokens)
    record_property("parity_excused", counts.num_excused)
    if counts.num_excused:
        warnings.warn(
            f"{counts.num_excused} differences at near ties excused, {counts.num_tokens} tokens agree", stacklevel=1
        )
