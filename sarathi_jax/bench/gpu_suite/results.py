"""One JSON file a part, written whole after every row, so that a run that is cut off loses nothing and resumes."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_ATTEMPTS = 2
"""A row that failed, hung or was cut off is tried again by the next run, this often in all."""

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "torch", "triton", "transformers")


class Skipped(Exception):  # noqa: N818
    """A row that cannot be measured here; the message says why."""


class Results:
    """The rows of a part.

    Args:
      path: the JSON file; what stands there already is kept.
      part: its name.
      dry_run: written into the header; a file of the other kind is refused.
      commit: of the code; None: what git says.
      is_alive: whether the device still works; asked when a row failed.

    Raises:
      ValueError: the file is of another part, or of a dry run where this is none, or the other way round.
    """

    def __init__(
        self,
        path: Path,
        part: str,
        dry_run: bool,
        commit: str | None = None,
        is_alive: Callable[[], bool] | None = None,
    ):
        self._path = path
        self._is_alive = is_alive or (lambda: True)
        header = make_header(part, dry_run, commit)
        if path.exists():
            document = json.loads(path.read_text())
            old = document["header"]
            if (old["part"], old["dry_run"]) != (part, dry_run):
                raise ValueError(
                    f"{path} holds part {old['part']!r} with dry_run={old['dry_run']}: choose another --out"
                )
            if old["device"] != header["device"]:
                raise ValueError(
                    f"{path} was measured on {old['device']!r}, this is {header['device']!r}: another --out"
                )
            self.header, self.rows = old, document["rows"]
        else:
            self.header, self.rows = header, {}

    def is_done(self, key: str) -> bool:
        """Whether a row is measured, skipped, or given up after `MAX_ATTEMPTS`."""
        row = self.rows.get(key, {"status": "new", "attempts": 0})
        return row["status"] in ("measured", "skipped") or row["attempts"] >= MAX_ATTEMPTS

    def measure(self, key: str, function: Callable[[], Mapping[str, Any]], **fields: Any) -> bool:
        """Runs a measurement and keeps what it returns, or why there is nothing; a row that is done is left alone.

        The row is marked before it starts: what hangs or takes the process down is known to the next run.

        Args:
          key: name of the row.
          function: returns the row's numbers; may raise `Skipped`.
          fields: what the row is about, kept whatever comes of it.

        Returns:
          False if it failed and left the device unusable to this process.
        """
        if self.is_done(key):
            return True
        attempts = self.rows.get(key, {}).get("attempts", 0) + 1
        row = {**fields, "status": "started", "attempts": attempts}
        self._keep(key, row)
        try:
            row |= {**function(), "status": "measured"}
        except Skipped as reason:
            row |= {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # a kernel may fail in any way, and the other rows are wanted all the same
            text = f"{type(error).__name__}: {error}"
            row |= {"status": "failed", "reason": text[:600], "traceback": traceback.format_exc()[-2000:]}
        self._keep(key, row)
        told = {name: value for name, value in row.items() if name != "traceback" and name not in fields}
        print(key, json.dumps(told), flush=True)
        return row["status"] != "failed" or self._is_alive()

    def _keep(self, key: str, row: Mapping[str, Any]) -> None:
        self.rows[key] = dict(row)
        write_atomically(self._path, json.dumps({"header": self.header, "rows": self.rows}, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file beside `path` and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def make_header(part: str, dry_run: bool, commit: str | None) -> dict[str, Any]:
    """What every file tells about itself. Asks the driver, not JAX, for the device: some parts leave it to others."""
    return {
        "part": part,
        "dry_run": dry_run,
        "device": "CPU (dry run)" if dry_run else gpu_name(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit
        or _ask("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD")
        or "unknown",
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def gpu_name() -> str:
    """Name and driver of the first GPU.

    Raises:
      SystemExit: there is none; the message says what to do.
    """
    answer = _ask("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if not answer:
        sys.exit("no NVIDIA GPU is here (nvidia-smi does not answer): run on a machine with one, or with --dry_run")
    return answer.splitlines()[0].strip()


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
