"""An environment of its own (`make test-devices`): compilers for devices that are not there; writes what they said."""

import importlib.util
import os
from pathlib import Path

import pytest

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nobody runs anything on a TPU here
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
    """Rows of docs/kernels-compiled.md by section; a run of some tests replaces their rows alone."""
    new: dict[str, list[str]] = {title: [] for title in HEADS}
    yield new
    old = TABLE.read_text() if TABLE.exists() else ""
    sections = []
    for title, head in HEADS.items():
        rows = {key_of(row): row for row in rows_of(old, title)} | {key_of(row): row for row in new[title]}
        columns = head.count("|") + 1
        sections.append(
            "\n".join(["", f"## {title}", f"| {head} |", "|" + "---|" * columns, *sorted(rows.values()), ""])
        )
    TABLE.write_text(INTRODUCTION + "".join(sections))


def rows_of(text: str, title: str) -> list[str]:
    """The table below a heading, without its head."""
    body = text.partition(f"## {title}\n")[2].partition("\n\n")[0]
    return body.splitlines()[2:]


def key_of(row: str) -> tuple[str, ...]:
    """What was compiled: kernel or model, target, configuration or backend."""
    return tuple(row.split("|")[1:4])
