"""The command; see the package.

A part runs in a process of its own under a watch: a kernel that hangs or takes the device down costs its row and a
restart, not the part.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags

from sarathi_jax.bench.gpu_suite import capacity, kernels, models, numerics, peers, report
from sarathi_jax.bench.gpu_suite.results import Results
from sarathi_jax.bench.gpu_suite.timing import device_works
from sarathi_jax.bench.gpu_suite.watch import CUT_OFF, watch

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


def result_path(out: str, part: str, tag: str) -> Path:
    return Path(out) / f"{part}{f'.{tag}' if tag else ''}.json"


def run_part(part: str, results: Results, limit_s: float) -> bool:
    """Runs what is left of a part in this process.

    Returns:
      Whether every row was reached.
    """
    backends, dry_run = _BACKENDS.value, _DRY_RUN.value
    if part == "capacity":
        return capacity.run(results, backends, dry_run)
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
        command = [sys.executable, "-m", "sarathi_jax.bench.gpu_suite", *sys.argv[1:], "--worker"]
        sys.exit(watch(command, path, _LIMIT_S.value, row_limit_s))
    if _DRY_RUN.value:
        jax.config.update("jax_platforms", "cpu")
        print("DRY RUN: tiny shapes on a CPU, no number of it says anything about a GPU", flush=True)
    leaves_device = part.startswith(("peer", "kernels-torch"))
    results = Results(path, part, _DRY_RUN.value, _COMMIT.value, None if leaves_device else device_works)
    # A peer has to end before the watch ends everything.
    if not run_part(part, results, max(1.0, _LIMIT_S.value - 20)):
        sys.exit(CUT_OFF)


if __name__ == "__main__":
    app.run(main)
