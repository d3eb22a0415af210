"""The command; see the package.

A part runs in a process of its own under a watch: a kernel that hangs or takes the device down costs its row and a
restart, not the part.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags

from sarathi_jax.bench.gpu_suite import capacity, kernels, models, numerics, peers, report
from sarathi_jax.bench.gpu_suite.results import Results

PARTS = (
    "numerics",
    "kernels",
    "model-mistral-7b",
    "kernels-torch",
    "peer-mistral-7b",
    "model-llama2-70b-w8",
    "model-yi-34b",
    "peer-yi-34b",
    "peer-llama2-70b-w8",
    "capacity",
)
"""In the order in which to run them."""

_PART = flags.DEFINE_enum("part", None, (*PARTS, "merge"), "what to run", required=True)
_OUT = flags.DEFINE_string("out", None, "folder of the JSON files and of the page", required=True)
_BACKENDS = flags.DEFINE_list("attention_backend", "triton,mosaic_gpu,xla", "comma-separated, in this order")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 64, "of the models' cache", lower_bound=1)
_LIMIT_S = flags.DEFINE_float("limit_s", 520, "seconds after which the part ends, to be run again")
_ROW_LIMIT_S = flags.DEFINE_float("row_limit_s", 200, "seconds without a new row after which the part is restarted")
_TAG = flags.DEFINE_string("tag", "", "added to the file's name: for runs with other XLA_FLAGS, say")
_PYTHON = flags.DEFINE_string("peer_python", peers.default_python(), "interpreter that has torch and transformers")
_COMMIT = flags.DEFINE_string("commit", None, "of the code, where git cannot tell")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "tiny shapes on a CPU, kernels interpreted; measures nothing")
_WORKER = flags.DEFINE_boolean("worker", False, "runs the part in this process, without the watch")

CUT_OFF = 75
"""Exit status of a part that has rows left (EX_TEMPFAIL): run it again."""


def result_path(out: str, part: str, tag: str) -> Path:
    return Path(out) / f"{part}{f'.{tag}' if tag else ''}.json"


def run_part(part: str, results: Results, limit_s: float) -> bool:
    """Runs what is left of a part in this process.

    Returns:
      Whether every row was reached.
    """
    backends, dry_run = _BACKENDS.value, _DRY_RUN.value
    if part == "capacity":
        return capacity.run(results)
    if part == "kernels-torch":
        return peers.run_torch(results, _PYTHON.value, limit_s, dry_run)
    if part in ("numerics", "kernels"):
        return {"numerics": numerics, "kernels": kernels}[part].run(results, backends, dry_run)
    kind, _, name = part.partition("-")
    setting = models.SETTINGS[name]
    if kind == "peer":
        cases = setting.throughput_cases(dry_run)
        quantized = setting.quantization is not None
        return peers.run_transformers(results, _PYTHON.value, setting.name, cases, quantized, limit_s)
    return models.run(results, setting, backends, _BLOCK_SIZE.value, dry_run)


def watch(path: Path, limit_s: float, row_limit_s: float) -> int:
    """Runs this command as a worker until it is done, again when it ends badly or shows no new row for long.

    Returns:
      0, or `CUT_OFF` when the time was up first or a worker got nowhere.
    """
    end_s = time.monotonic() + limit_s
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
    command = [sys.executable, "-m", "sarathi_jax.bench.gpu_suite", *sys.argv[1:], "--worker"]
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


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    part = _PART.value
    if part == "merge":
        print(report.write_page(Path(_OUT.value)))
        return
    path = result_path(_OUT.value, part, _TAG.value)
    if not _WORKER.value:
        # A peer prints its rows only when it ends.
        row_limit_s = _LIMIT_S.value if part.startswith(("peer", "kernels-torch")) else _ROW_LIMIT_S.value
        sys.exit(watch(path, _LIMIT_S.value, row_limit_s))
    if _DRY_RUN.value:
        jax.config.update("jax_platforms", "cpu")
        print("DRY RUN: tiny shapes on a CPU, no number of it says anything about a GPU", flush=True)
    results = Results(path, part, _DRY_RUN.value, _COMMIT.value)
    # A peer has to end before the watch ends everything.
    if not run_part(part, results, max(1.0, _LIMIT_S.value - 20)):
        sys.exit(CUT_OFF)


if __name__ == "__main__":
    app.run(main)
