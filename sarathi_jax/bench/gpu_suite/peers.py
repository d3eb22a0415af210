"""torch and transformers on the same work, each in a process of its own, which has the whole device to itself."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sarathi_jax.bench.gpu_suite.attention import workloads
from sarathi_jax.bench.gpu_suite.results import Results, Skipped
from sarathi_jax.resources import config_path

_LARGEST_BYTES = 120e9
"""Weights beyond this are not tried: the device needs room for a cache too."""

Row = dict[str, Any]


def run_torch(results: Results, python: str, limit_s: float, dry_run: bool) -> bool:
    """torch's attention on dense equivalents of the batches of `kernels`.

    Returns:
      Whether every row was reached.
    """
    cases, fields = [], {}
    for workload in workloads(dry_run):
        if workload.kind == "mixed":
            continue
        (length, kv_len), shape = workload.chunks[0], workload.shape
        key = f"attention torch {workload.name}"
        sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
        cases.append({"key": key, "sequences": len(workload.chunks), "length": length, "kv_len": kv_len, **sizes})
        fields[key] = {"backend": "torch", **workload.fields()}
    return _run(results, python, "torch_attention.py", cases, fields, lambda cases: cases, limit_s)


def run_transformers(
    results: Results, python: str, model: str, cases: Sequence[Mapping[str, int]], quantized: bool, limit_s: float
) -> bool:
    """transformers' continuous batching on the cases of `models`.

    Returns:
      Whether every row was reached.
    """
    config = yaml.safe_load(config_path("models", model).read_text())["config"]
    fields = {f"transformers {case_name(c)}": {"backend": "transformers", "kind": "throughput", **c} for c in cases}
    named = [{"key": key, **case} for key, case in zip(fields, cases, strict=True)]
    reason = None
    if quantized:
        reason = "transformers needs a package that is not there to make 8-bit weights, and bfloat16 does not fit"
    elif 2 * num_weights(config) > _LARGEST_BYTES:
        reason = f"weights of {2 * num_weights(config) / 1e9:.0f} GB leave no room for a cache"
    if reason is not None:
        for key in fields:
            results.measure(key, _skip(reason), **fields[key])
        return True
    return _run(
        results, python, "transformers_serving.py", named, fields, lambda c: {"config": config, "cases": c}, limit_s
    )


def case_name(case: Mapping[str, int]) -> str:
    return f"{case['requests']} x ({case['prompt_tokens']} + {case['output_tokens']})"


def num_weights(config: Mapping[str, Any]) -> int:
    """Of a LLaMA-like config.json: products, embedding and head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = hidden * config.get("num_key_value_heads", heads) // heads
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * layer + 2 * config["vocab_size"] * hidden


def _run(
    results: Results,
    python: str,
    script: str,
    cases: list[dict[str, Any]],
    fields: Mapping[str, Mapping[str, Any]],
    request: Callable[[list[dict[str, Any]]], Any],
    limit_s: float,
) -> bool:
    """Feeds what is left to a script and keeps each line that it prints."""
    left = [case for case in cases if not results.is_done(case["key"])]
    if not left:
        return True
    timed_out = False
    # -P: the script's folder is not searched for modules, so that none of ours hides one of torch's.
    command = [python, "-P", str(Path(__file__).parent / script)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as peer:
        try:
            out, err = peer.communicate(json.dumps(request(left)), timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            timed_out = True
            peer.kill()
            out, err = peer.communicate()
    rows = _parse(out)
    for case in left:
        key = case["key"]
        if key in rows:
            results.measure(key, _give(rows[key]), **fields[key])
        elif timed_out:
            results.measure(key, _fail(f"not done after {limit_s:.0f} s"), **fields[key])
            break  # the others had no turn
        else:
            last = err.strip().splitlines()[-1:] or ["nothing was said"]
            reason = f"{script} ended with status {peer.returncode}: {last[0][:300]}"
            # Without a single row it cannot run here, which another try will not change.
            results.measure(key, _fail(reason) if rows else _skip(reason), **fields[key])
    return all(results.is_done(case["key"]) for case in cases)


def _parse(out: str) -> dict[str, Row]:
    rows = {}
    for line in out.splitlines():
        try:
            row = json.loads(line)
            rows[row.pop("key")] = row
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rows


def _give(row: Row) -> Callable[[], Row]:
    def give() -> Row:
        if "reason" in row:
            raise Skipped(row["reason"])
        if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
            raise ValueError(f"numbers that are not finite: {row}")
        return row

    return give


def _skip(reason: str) -> Callable[[], Row]:
    def skip() -> Row:
        raise Skipped(reason)

    return skip


def _fail(reason: str) -> Callable[[], Row]:
    def fail() -> Row:
        raise RuntimeError(reason)

    return fail


def default_python() -> str:
    """The interpreter that runs the peers unless another is named: this one."""
    return sys.executable
