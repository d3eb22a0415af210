"""Compiled models, one of each kind for the whole run, and the count of excused differences."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.serving import Parity, Served, build

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("llama3.1", {"token_buckets": (4, 16, 64)}),
    "windowed": ("mistral", {}),
    "half": ("mistral", {"dtype": "bfloat16"}),
}


@pytest.fixture(scope="session")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], Served]:
    """One of `MODELS` on tp x pp devices, built once; on several with two buckets, which compile sooner than three."""
    served: dict[tuple[str, int, int], Served] = {}

    def get(name: str, tp: int, pp: int) -> Served:
        key = name, tp, pp
        if key not in served:
            model, settings = MODELS[name]
            if tp * pp > 1:
                settings = settings | {"token_buckets": (16, 64)}
            served[key] = build(model, tmp_path_factory.mktemp(name), tp=tp, pp=pp, **settings)
        return served[key]

    return get


@pytest.fixture(scope="session")
def decoder(spread: Callable[[str, int, int], Served]) -> Served:
    """Full attention, three buckets, a tokenizer, three end-of-text tokens."""
    return spread("decoder", 1, 1)


@pytest.fixture(scope="session")
def windowed(spread: Callable[[str, int, int], Served]) -> Served:
    """Every layer sees 24 tokens."""
    return spread("windowed", 1, 1)


@pytest.fixture(scope="session")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Parallel attention, one KV head, no tokenizer."""
    return build("falcon-7b", tmp_path_factory.mktemp("falcon"), with_tokenizer=False)


@pytest.fixture(scope="session")
def half(spread: Callable[[str, int, int], Served]) -> Served:
    """The one with windows, in bfloat16."""
    return spread("half", 1, 1)


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
