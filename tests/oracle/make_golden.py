"""Makes the values under tests/golden/ anew: ``python -m tests.oracle.make_golden [name ...]``.

The environment variable SARATHI_ORACLE_PYTHON names a Python that has torch and transformers.
"""

import sys
import tempfile
from pathlib import Path

from tests.golden_file import DIRECTORY, read_expected, write_golden
from tests.oracle.reference import run_reference
from tests.tiny_models import TINY

MAX_BYTES = 3_000_000


def main(names: list[str]) -> None:
    DIRECTORY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        run_reference(names, Path(root))
        for name in names:
            size = write_golden(name, read_expected(Path(root) / f"{name}.npz"))
            print(f"{name}: {size:,} bytes")
    total = sum(file.stat().st_size for file in DIRECTORY.rglob("*") if file.is_file())
    if total > MAX_BYTES:
        raise SystemExit(f"tests/golden holds {total:,} bytes, more than {MAX_BYTES:,}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(TINY))
