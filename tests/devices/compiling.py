"""Compiles for GPUs and TPUs that are not there, and reads what the compilers say."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.ragged_paged_attention import BACKENDS
from sarathi_jax.parallel import AXIS
from tests.kernels.abstract import on_h200

# Name -> platform, and what `get_topology_desc` calls it; the last word of a GPU's name is that of its description.
TARGETS = {
    "H200": ("cuda", "1x1x1"),
    "8 x H200": ("cuda", "1x1x8"),
    "8 x A100": ("cuda", "1x1x8"),
    "8 x A40": ("cuda", "1x1x8"),
    "TPU v5e": ("tpu", "v5e:2x4"),
    "TPU v6e": ("tpu", "v6e:2x2"),
}


@dataclasses.dataclass(frozen=True)
class Ptx:
    """One GPU kernel as ptxas sees it.

    Attributes:
      name: of its entry.
      registers: of a thread.
      spilled_bytes: registers kept in memory for want of registers, stores and loads.
      scalar_loads: loads of one element from global memory inside loops.
      wide_copies: copies of 16 bytes, vector loads and TMA copies inside loops.
      products: tensor-core instructions inside loops.
    """

    name: str
    registers: int
    spilled_bytes: int
    scalar_loads: tuple[str, ...]
    wide_copies: int
    products: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out of a compilation.

    Attributes:
      executable: to ask for its memory.
      kernels: its Pallas kernels, on a GPU.
    """

    executable: jax.stages.Compiled
    kernels: tuple[Ptx, ...]


def mesh_of(target: str) -> jax.sharding.Mesh:
    """All GPUs of the target; the first chip alone of a TPU slice."""
    platform, name = TARGETS[target]
    if platform == "cuda":
        text = (Path(__file__).parent / f"{target.split()[-1].lower()}.textproto").read_text()
        topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology=name)
        devices = np.array(topology.devices)
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        devices = np.array(topology.devices[:1])
    return jax.sharding.Mesh(devices, (AXIS,))


def everywhere(target: str) -> jax.sharding.NamedSharding:
    """On every device of the target."""
    return jax.sharding.NamedSharding(mesh_of(target), jax.sharding.PartitionSpec())


def device_of(backend: str):
    """The context in which a backend's kernel is traced and lowered."""
    return on_h200() if BACKENDS[backend].platform == "cuda" else contextlib.nullcontext()


def compile_lowered(lowered: jax.stages.Lowered, platform: str) -> Compiled:
    """Compiles, and analyses the PTX of the Pallas kernels."""
    if platform == "tpu":
        return Compiled(lowered.compile(), ())
    with tempfile.TemporaryDirectory() as folder, _printed_to(Path(folder) / "mosaic.ptx"):
        options = {"xla_dump_to": folder, "xla_gpu_dump_llvmir": True, "xla_dump_emitter_re": "ptx"}
        executable = lowered.compile(compiler_options=options)
        texts = [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]
    modules = [module for text in texts for module in re.findall(r"\.version.*?(?=\.version|\Z)", text, re.DOTALL)]
    ours = ("ragged_paged_attention", "write_kv")
    return Compiled(executable, tuple(analyse(m) for m in modules if any(f".entry {name}" in m for name in ours)))


@contextlib.contextmanager
def _printed_to(path: Path):
    """Sends what Mosaic prints (``MOSAIC_GPU_DUMP_PTX``) to a file; it knows no other way out."""
    kept = os.dup(1)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def analyse(ptx: str) -> Ptx:
    """Assembles a module and counts the memory instructions of its loops."""
    # Mosaic prints other things behind its module, which ends with a brace on a line of its own.
    ptx = ptx[: ptx.rindex("\n}") + 3]
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\$?\w+):", line))}
    looped: set[int] = set()
    for i, line in enumerate(lines):
        match = re.search(r"\bbra(?:\.uni)?\s+(\$?\w+);", line)
        if match and labels.get(match[1], i + 1) <= i:
            looped.update(range(labels[match[1]], i + 1))
    inner = [lines[i] for i in sorted(looped)]
    loads = [match[0] for line in inner if (match := re.search(r"\bld\.global\S*", line))]
    copies = [line for line in inner if re.search(r"cp\.async\.c[ag]\.\S+ .* 0x10|cp\.async\.bulk\.tensor", line)]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas(), "-v", "-arch=sm_90a", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Ptx(
        name=re.findall(r"\.entry (\w+)", ptx)[0],
        registers=int(re.findall(r"Used (\d+) registers", report)[0]),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        scalar_loads=tuple(load for load in loads if not re.search(r"\.v[248]\b", load)),
        wide_copies=len(copies) + sum(bool(re.search(r"\.v[248]\b", load)) for load in loads),
        products=sum(bool(re.search(r"\b(wgmma\.mma_async|mma\.sync)", line)) for line in inner),
    )


def ptxas() -> str:
    """The assembler that the environment brings along."""
    spec = importlib.util.find_spec("nvidia")
    found: Sequence[Path] = (
        []
        if spec is None
        else [path for folder in spec.submodule_search_locations or () for path in Path(folder).glob("**/bin/ptxas")]
    )
    if not found:
        raise FileNotFoundError("no ptxas among the nvidia packages: make the environment with `make test-devices`")
    return str(found[0])
