"""An environment of its own (`make test-devices`): compilers for devices that are not there; writes what they said."""

import importlib.util
import os
from pathlib import Path

import pytest

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"

MISSING = [name for name in ("jax_cuda13_plugin", "libtpu", "nvidia") if importlib.util.find_spec(name) is None]

TABLE = Path(__file__).resolve().parents[2] / "docs" / "kernels-compiled.md"
HEADS = {
    "GPU kernels": (
        "kernel | target | configuration | registers | spilled bytes | scalar loads in loops | wide copies in loops | "
        "tensor-core instructions in loops"
    ),
    "TPU kernels": "kernel | target | configuration | code KiB | scratch MiB",
    "Model steps": "model | target | backend | arguments GiB | aliased GiB | scratch MiB",
}
INTRODUCTION = """# What the compilers say of the kernels

Written by `make test-devices`, which compiles for devices that are not there; nothing here was run on one. Every
program below has its cache aliased, not copied, and fits the shared memory (GPU) or VMEM (TPU) of its target: the
compilers refuse it otherwise. Scalar loads in loops are look-ups in the block table.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        reason = f"needs {', '.join(MISSING)}: run `make test-devices`, which makes an environment that has them"
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tables():
    """Rows of docs/kernels-compiled.md by section; written when a whole run is over."""
    rows: dict[str, list[str]] = {head: [] for head in HEADS}
    yield rows
    if all(rows.values()):
        TABLE.write_text(INTRODUCTION + "".join(map(section, HEADS, rows.values())))


def section(title: str, rows: list[str]) -> str:
    columns = HEADS[title].count("|") + 1
    return "\n".join(["", f"## {title}", f"| {HEADS[title]} |", "|" + "---|" * columns, *rows, ""])
