"""Files of results: JSON and CSV that other programs can read."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """The same for JSON, which has no infinity and no NaN: null in their place."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A table of rows that have the same columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else [])
        table.writeheader()
        table.writerows(rows)
