"""The layers of the project: every module imports only what stands above it, or further left in its own row."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# Top to bottom, left to right. A name stands for the module, or for a package with everything in it (a package may
# order its own modules as it likes unless they are listed one by one). New module: put it into its row here.
ROWS = (
    ("sarathi_jax", "sarathi_jax.resources"),
    ("sarathi_jax.config", "sarathi_jax.deployment"),
    ("sarathi_jax.partition",),
    ("sarathi_jax.request",),
    ("sarathi_jax.sequence",),
    ("sarathi_jax.kv", "sarathi_jax.kv.blocks"),
    ("sarathi_jax.latency",),
    ("sarathi_jax.scheduling.plan", "sarathi_jax.scheduling.base", "sarathi_jax.scheduling"),
    ("pallas_kernels",),
    ("sarathi_jax.kv.cache", "sarathi_jax.batch"),
    ("sarathi_jax.models",),
    ("sarathi_jax.weights",),
    (
        "sarathi_jax.sampling",
        "sarathi_jax.parallel",
        "sarathi_jax.compiling",
        "sarathi_jax.program_store",
        "sarathi_jax.step_program",
        "sarathi_jax.runner",
        "sarathi_jax.sizing",
    ),
    ("sarathi_jax.telemetry", "sarathi_jax.tokenizer", "sarathi_jax.structured", "sarathi_jax.output"),
    (
        "sarathi_jax.executor",
        "sarathi_jax.clock",
        "sarathi_jax.timing",
        "sarathi_jax.intake",
        "sarathi_jax.engine",
        "sarathi_jax.replica",
        "sarathi_jax.loading",
        "sarathi_jax.llm",
    ),
    ("sarathi_jax.training",),
    (
        "sarathi_jax.jobs",
        "sarathi_jax.workloads",
        "sarathi_jax.simulate",
        "sarathi_jax.server",
        "sarathi_jax.bench",
    ),
    ("sarathi_jax.cli",),
    ("main",),
)
RANKS = {name: rank for rank, name in enumerate(itertools.chain.from_iterable(ROWS))}

# Pairs that the order alone would allow.
FORBIDDEN = (
    ("sarathi_jax.telemetry", "sarathi_jax.tokenizer"),
    ("sarathi_jax.output", "sarathi_jax.telemetry"),
    ("sarathi_jax.executor", "pallas_kernels"),
    ("sarathi_jax.engine", "pallas_kernels"),
    ("sarathi_jax.llm", "pallas_kernels"),
    ("sarathi_jax.training", "sarathi_jax.engine"),
    ("sarathi_jax.training", "sarathi_jax.llm"),
)

HOST_ONLY = (
    "sarathi_jax.resources",
    "sarathi_jax.config",
    "sarathi_jax.request",
    "sarathi_jax.sequence",
    "sarathi_jax.kv.blocks",
    "sarathi_jax.kv.sizes",
    "sarathi_jax.latency",
    "sarathi_jax.partition",
    "sarathi_jax.simulate",
    "sarathi_jax.workloads",
    "sarathi_jax.scheduling",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    paths = [REPO / "main.py", *(REPO / "sarathi_jax").rglob("*.py"), *(REPO / "pallas_kernels").rglob("*.py")]
    return {module_name(path): path for path in paths if path.exists()}


SOURCES = sources()


def row_name(module: str) -> str | None:
    """The listed name that a module falls under: itself or its nearest listed package."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        # The bare top package is listed for its __init__ alone, or every new module would be known.
        if name in RANKS and (name != "sarathi_jax" or module == name):
            return name
    return None


def imports(module: str, path: Path) -> set[str]:
    """Modules of this project that a file imports, anywhere in it: inside functions and `if TYPE_CHECKING` too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in SOURCES else source)
    return {name for name in found if name.split(".")[0] in ("sarathi_jax", "pallas_kernels", "main")}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_only_what_stands_above(module):
    own = row_name(module)
    assert own is not None, f"{module} has no place: add it to ROWS in {Path(__file__).relative_to(REPO)}"
    for imported in sorted(imports(module, SOURCES[module])):
        other = row_name(imported)
        assert other is not None, f"{module} imports {imported}, which has no place in ROWS"
        if other == own or own.startswith(f"{other}.") or other.startswith(f"{own}."):
            # Within one listed package; its own modules, where they are listed, still keep their order.
            if RANKS[other] > RANKS[own] and not other.startswith(f"{own}."):
                pytest.fail(f"{module} imports {imported}, which stands below it")
            continue
        assert RANKS[other] < RANKS[own], f"{module} imports {imported}, which stands below it (or to its right)"
        assert (own, other) not in FORBIDDEN, f"{module} must not know {imported}"


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if name.startswith("sarathi_jax.scheduling.")))
def test_a_policy_knows_no_other_policy(module):
    if module == "sarathi_jax.scheduling.make":
        return
    shared = {f"sarathi_jax.scheduling.{name}" for name in ("plan", "base", "turns", "chunking")}
    others = {name for name in imports(module, SOURCES[module]) if name.startswith("sarathi_jax.scheduling.")}
    assert others <= shared


def test_kernels_do_not_know_the_engine():
    for module, path in SOURCES.items():
        if module.startswith("pallas_kernels"):
            assert not [name for name in imports(module, path) if name.startswith("sarathi_jax")], module


def test_host_modules_do_not_import_jax():
    modules = [name for name in sorted(SOURCES) if any((name + ".").startswith(host + ".") for host in HOST_ONLY)]
    assert "sarathi_jax.request" in modules
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0, f"one of {modules} imports jax"
