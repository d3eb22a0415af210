"""Models on one device, which those on several are compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.engine.serving import Served, build


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Callable[[str, Mapping[str, Any]], Served]:
    """A tiny model by name and changed fields, built once."""
    served: dict[str, Served] = {}

    def get(name: str, changes: Mapping[str, Any]) -> Served:
        key = f"{name} {sorted(changes.items())}"
        if key not in served:
            served[key] = build(name, tmp_path_factory.mktemp(name), changes=dict(changes))
        return served[key]

    return get
