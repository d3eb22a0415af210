"""Keeps a part going: a kernel that hangs or takes the device down costs its row and a restart, not the part."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

CUT_OFF = 75
"""Exit status of a part that has rows left (EX_TEMPFAIL): run it again."""


def watch(command: Sequence[str], path: Path, limit_s: float, row_limit_s: float) -> int:
    """Runs a worker until it is done, again when it ends badly or shows no new row for long.

    Args:
      command: of the worker, which is told how long it has by a further ``--limit_s``.
      path: the file that it writes after every row.
      limit_s: seconds for all of it.
      row_limit_s: seconds without a new row after which the worker is stopped and started again.

    Returns:
      0, or `CUT_OFF` when the time was up first or a worker got nowhere.
    """
    end_s = time.monotonic() + limit_s
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
    while (left_s := end_s - time.monotonic()) > 0:
        before = path.stat().st_mtime_ns if path.exists() else 0
        with subprocess.Popen([*command, f"--limit_s={left_s}"], env=environment, start_new_session=True) as worker:
            try:
                status = _wait(worker, path, end_s, row_limit_s)
            finally:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
        if status == 0:
            return 0
        after = path.stat().st_mtime_ns if path.exists() else 0
        if after == before:
            return status or CUT_OFF
    print(f"time is up; run the same command again for the rows that are left ({path})", flush=True)
    return CUT_OFF


def _wait(worker: subprocess.Popen, path: Path, end_s: float, row_limit_s: float) -> int:
    """Status of the worker; `CUT_OFF` when it has to be killed."""
    last, last_s = 0, time.monotonic()
    while worker.poll() is None:
        time.sleep(0.2)
        now_s = time.monotonic()
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        if stamp != last:
            last, last_s = stamp, now_s
        if now_s > end_s:
            return CUT_OFF
        if now_s - last_s > row_limit_s:
            print(f"no new row for {row_limit_s:.0f} s: restarting the part", flush=True)
            return CUT_OFF
    return worker.returncode
