"""Shared set-up of the tests: one compilation cache for the whole run (`make check` keeps its own), on CPU."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# Here, because the conftest of a folder below may import jax before `pytest_configure` runs.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Virtual ones; who asks for no mesh uses the first alone.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Workers of pytest-xdist inherit the environment, so one compiles for all.
OWN_CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="sarathi-jax-test-cache-")
if OWN_CACHE is not None:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE


def pytest_configure(config: pytest.Config) -> None:
    if OWN_CACHE is not None:
        config.add_cleanup(lambda: shutil.rmtree(OWN_CACHE, ignore_errors=True))


@pytest.fixture(scope="session")
def repo() -> Path:
    """Top of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of large reference data that lies beside some checkouts; tests that need it are skipped without it."""
    path = REPO.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the reference data in ../shared, which this checkout does not have")
    return path
