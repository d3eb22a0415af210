"""Fits the constants of `Roofline` to measured times: of kernels, of messages, of whole iterations, of nothing else.

The order is what makes a simulated capacity a prediction: kernels and links first, each from its own times; then the
host term from iterations; then the constants are written down in `devices` and stay as they are.
"""

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarathi_jax.latency.devices import Device, HostTerm, Kernels, Link
from sarathi_jax.latency.roofline import Gemm, Roofline, gemm_s
from sarathi_jax.latency.work import Work, chunk_keys

_KNOTS = (1, 8, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096)
_GEMMS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")


class FitError(ValueError):
    """Measurements that nothing can be fitted to; the message names the file and what it lacks."""


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """Kernel times of one layer at one size.

    Attributes:
      model: the file's name without its ending.
      tp: devices that share the layer.
      num_tokens: of the step.
      gemms: the four products; one where single products were measured.
      gemm_s: their seconds.
      streams: (values read and written, seconds) of kernels that only move bytes.
    """

    model: str
    tp: int
    num_tokens: int
    gemms: tuple[Gemm, ...]
    gemm_s: tuple[float, ...]
    streams: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Iteration:
    """Measured iterations, one or several in a row: what each did and how long they took together."""

    works: tuple[Work, ...]
    seconds: float


def read_layer_times(path: Path) -> list[LayerTime]:
    """Kernel times (ms) in vidur's layout: ``time_stats.<kernel>.median``, ``num_tokens``, the model's sizes.

    Raises:
      FitError: a column is missing, or holds something else than a number.
    """
    return _read(path, lambda row: _layer_time(path.stem, row))


def read_messages(path: Path, num_devices: int, devices_per_node: int) -> list[tuple[float, float]]:
    """(bytes, seconds) of all-reduces or sends in vidur's layout, of one group of devices.

    Raises:
      FitError: a column is missing, or no row is of this group.
    """

    def message(row: dict[str, str]) -> tuple[float, float] | None:
        if (int(row["num_workers"]), int(row["devices_per_node"])) != (num_devices, devices_per_node):
            return None
        return float(row["size"]), 1e-3 * float(row[f"time_stats.{row['collective']}.median"])

    found = [row for row in _read(path, message) if row is not None]
    if not found:
        raise FitError(f"{path} has no times of {num_devices} devices, {devices_per_node} a node")
    return found


def read_sizes(path: Path) -> list[tuple[float, float]]:
    """(bytes, seconds) of messages: columns ``bytes`` and ``ms``.

    Raises:
      FitError: a column is missing, or holds something else than a positive number.
    """

    def message(row: dict[str, str]) -> tuple[float, float]:
        num_bytes, seconds = float(row["bytes"]), 1e-3 * float(row["ms"])
        if not (0 < num_bytes < np.inf and 0 < seconds < np.inf):
            raise ValueError("bytes and times must be above 0")
        return num_bytes, seconds

    return _read(path, message)


def read_iterations(path: Path, context: int = 0) -> list[Iteration]:
    """Iterations of the paper's artifact: one prompt, or decodes, or both; times in s or ms, told apart by size.

    Args:
      path: of ``figure_2`` or ``table_2``.
      context: tokens in the cache of each sequence that decodes (the files do not say).

    Raises:
      FitError: a column is missing.
    """

    def iteration(row: dict[str, str]) -> Iteration:
        decodes, prefills = int(row["batch_num_decode_tokens"]), int(row["batch_num_prefill_tokens"])
        seconds = float(row["batch_execution_time"])
        # No iteration here takes 10 s, none 10 ms.
        seconds = seconds if seconds < 10 else 1e-3 * seconds
        work = Work(decodes + prefills, decodes, decodes * context, chunk_keys(0, prefills), decodes + (prefills > 0))
        return Iteration((work,), seconds)

    return _read(path, iteration)


def prompt_works(num_tokens: int, chunk_size: int) -> tuple[Work, ...]:
    """The steps of one prompt alone, in chunks."""
    sizes = [(start, min(chunk_size, num_tokens - start)) for start in range(0, num_tokens, chunk_size)]
    return tuple(Work(length, num_prefill_keys=chunk_keys(start, length)) for start, length in sizes)


def read_prefills(path: Path) -> list[tuple[int, int, Iteration]]:
    """(prompt length, chunk size, whole prefill) of the paper's artifact, ``figure_9a``; times in ms.

    Raises:
      FitError: a column is missing.
    """

    def prefill(row: dict[str, str]) -> tuple[int, int, Iteration]:
        length, chunk_size = int(row["prefill_length"]), int(row["chunk_size"])
        seconds = 1e-3 * float(row["prefill_execution_time"])
        return length, chunk_size, Iteration(prompt_works(length, chunk_size), seconds)

    return _read(path, prefill)


def read_products(path: Path) -> list[LayerTime]:
    """Times of single products [m, k] x [k, n]: columns ``m``, ``k``, ``n``, ``ms``; each counts as a layer of one.

    Raises:
      FitError: a column is missing, or holds something else than a positive number.
    """

    def product(row: dict[str, str]) -> LayerTime:
        m, k, n, seconds = int(row["m"]), int(row["k"]), int(row["n"]), 1e-3 * float(row["ms"])
        if min(m, k, n) < 1 or not 0 < seconds < np.inf:
            raise ValueError("sizes and times must be above 0")
        return LayerTime(path.stem, 1, m, (Gemm(m, k, n),), (seconds,), ())

    return _read(path, product)


def fit_kernels(times: Sequence[LayerTime], device: Device) -> Kernels:
    """The constants that make the relative error of a layer's four products, summed, least on average.

    Args:
      times: of this device.
      device: its peaks; its own `kernels` are where the search starts, and keep what has no times: attention.
    """
    gemms, seconds = stack_gemms(times), np.array([time.gemm_s for time in times])
    start = device.kernels

    def kernels(x: np.ndarray) -> Kernels:
        flops, num_bytes, launch, sharpness, tile_share = x.tolist()
        return dataclasses.replace(
            start, flops=flops, bytes=num_bytes, launch_s=launch * 1e-6, sharpness=sharpness, tile_share=tile_share
        )

    def error(x: np.ndarray) -> float:
        if not (np.all(x[:2] > 0.05) and np.all(x[:2] <= 1) and x[2] >= 0 and 1 <= x[3] <= 10 and 0 <= x[4] <= 1):
            return np.inf
        return float(np.mean(np.abs(layer_errors(gemms, seconds, device, kernels(x)))))

    start = dataclasses.replace(start, by_tokens=())
    products = kernels(nelder_mead(error, np.array([0.75, 0.85, 6.0, 1.7, 0.5])))
    products = dataclasses.replace(products, by_tokens=_by_tokens(gemms, seconds, device, products))
    streams = np.array([stream for time in times for stream in time.streams])
    if not len(streams):
        return products
    bytes_s = 2 * streams[:, 0] / device.bandwidth

    def stream_error(x: np.ndarray) -> float:
        return float(np.mean(np.abs((bytes_s / x[0] + 1e-6 * x[1]) / streams[:, 1] - 1))) if np.all(x > 0) else np.inf

    share, launch = nelder_mead(stream_error, np.array([0.5, 3.0]))
    return dataclasses.replace(products, stream_bytes=float(share), stream_launch_s=float(launch) * 1e-6)


def _by_tokens(gemms: Gemm, seconds: np.ndarray, device: Device, kernels: Kernels) -> tuple[tuple[int, float], ...]:
    """All the time that layers took to all that they should have, at each size of `_KNOTS`."""
    tokens, expected = gemms.m[:, 0], gemm_s(gemms, device, kernels)
    sums = [(knot, seconds[tokens == knot].sum(), expected[tokens == knot].sum()) for knot in _KNOTS if knot in tokens]
    return tuple((knot, round(float(measured / ours), 3)) for knot, measured, ours in sums)


def stack_gemms(times: Sequence[LayerTime]) -> Gemm:
    """The products of all layers as one: arrays [layers, products of each]."""
    m, k, n = (
        np.array([[getattr(gemm, side) for gemm in time.gemms] for time in times], np.float64)
        for side in ("m", "k", "n")
    )
    return Gemm(m, k, n)


def layer_errors(gemms: Gemm, seconds: np.ndarray, device: Device, kernels: Kernels) -> np.ndarray:
    """Relative error of each layer's four products, summed.

    Args:
      gemms: of `stack_gemms`.
      seconds: measured, [layers, products of each].
      device: whose peaks.
      kernels: to be judged.
    """
    return gemm_s(gemms, device, kernels).sum(1) / seconds.sum(1) - 1


def fit_link(messages: Sequence[tuple[float, float]], num_devices: int | None = None) -> Link:
    """Latency and bandwidth with the least mean relative error.

    Args:
      messages: (bytes, seconds).
      num_devices: that summed them; None: they were sent from one to another.
    """
    num_bytes, seconds = np.array(messages).T
    moved = num_bytes * (1 if num_devices is None else 2 * (num_devices - 1) / num_devices)

    def error(x: np.ndarray) -> float:
        return float(np.mean(np.abs((np.exp(x[0]) + moved / np.exp(x[1])) / seconds - 1)))

    latency, bandwidth = np.exp(nelder_mead(error, np.log([np.min(seconds), np.max(moved) / np.max(seconds)])))
    return Link(float(latency), float(bandwidth))


def fit_host(iterations: Sequence[Iteration], roofline: Roofline) -> HostTerm:
    """The host term with the least mean relative error.

    Args:
      iterations: of a serving stack; without chunked prompts `masked_share` cannot be told from `attention_flops`.
      roofline: of the same model on the same devices.
    """

    def host(x: np.ndarray) -> HostTerm:
        launch, step, sequence = 1e-3 * x[:3]
        return HostTerm(float(launch), float(step), float(sequence), float(x[3]), float(x[4]))

    def error(x: np.ndarray) -> float:
        if not (np.all(x[:3] >= 0) and 0.01 < x[3] <= 1 and 0 <= x[4] <= 1):
            return np.inf
        stack = roofline.with_host(host(x))
        return float(np.mean([abs(sum(map(stack.work_s, it.works)) / it.seconds - 1) for it in iterations]))

    best = np.array([0.65, 10.0, 1.0, 0.4, 0.5])
    for _ in range(4):
        # The valley is flat: a simplex that has shrunk too early is spread again.
        best = nelder_mead(error, best)
    return host(best)


def nelder_mead(
    function: Callable[[np.ndarray], float], start: np.ndarray, num_evaluations: int = 600, tolerance: float = 1e-6
) -> np.ndarray:
    """Where a function of a few variables is least, without derivatives (Nelder and Mead, 1965).

    Args:
      function: to be made small; infinite where it is not allowed.
      start: where it is finite.
      num_evaluations: at most, about.
      tolerance: it ends when all corners of its simplex are as good as the best one, but for this.
    """
    corners = [start, *(start + 0.2 * start[i] * unit for i, unit in enumerate(np.eye(len(start))))]
    values = [function(corner) for corner in corners]
    while num_evaluations > 0 and max(values) - min(values) > tolerance:
        order = np.argsort(values)
        corners, values = [corners[i] for i in order], [values[i] for i in order]
        centre, worst = np.mean(corners[:-1], axis=0), corners[-1]
        mirrored = 2 * centre - worst
        value = function(mirrored)
        num_evaluations -= 2
        if value < values[0]:
            further = 3 * centre - 2 * worst
            further_value = function(further)
            if further_value < value:
                mirrored, value = further, further_value
        elif value >= values[-2]:
            nearer = (centre + (mirrored if value < values[-1] else worst)) / 2
            mirrored, value = nearer, function(nearer)
            if value >= values[-1]:
                corners = [corners[0], *((corners[0] + corner) / 2 for corner in corners[1:])]
                values = [function(corner) for corner in corners]
                num_evaluations -= len(corners)
                continue
        corners[-1], values[-1] = mirrored, value
    return corners[int(np.argmin(values))]


def _layer_time(model: str, row: dict[str, str]) -> LayerTime:
    tokens, tp = int(row["num_tokens"]), int(row["num_tensor_parallel_workers"])
    hidden, inner = int(row["n_embd"]), int(row["n_expanded_embd"]) // tp
    heads, kv_heads = int(row["n_head"]) // tp, -(-int(row["n_kv_head"]) // tp)
    dim = hidden // int(row["n_head"])
    ups = 2 if row["use_gated_mlp"] == "True" else 1
    shapes = ((hidden, (heads + 2 * kv_heads) * dim), (heads * dim, hidden), (hidden, ups * inner), (inner, hidden))
    streams = {
        "input_layernorm": 2 * hidden,
        "post_attention_layernorm": 2 * hidden,
        "attn_rope": 2 * (heads + kv_heads) * dim,
        "mlp_act": (ups + 1) * inner,
        "add": 3 * hidden,
    }
    return LayerTime(
        model,
        tp,
        tokens,
        tuple(Gemm(tokens, k, n) for k, n in shapes),
        tuple(_median_s(row, name) for name in _GEMMS),
        # What took less than the clock's resolution says nothing.
        tuple((tokens * n, t) for name, n in streams.items() if (t := _median_s(row, name)) > 0),
    )


def _median_s(row: dict[str, str], kernel: str) -> float:
    return 1e-3 * float(row[f"time_stats.{kernel}.median"])


def _read(path: Path, parse: Callable[[dict[str, str]], Any]) -> list[Any]:
    with path.open(newline="") as file:
        try:
            rows = [parse(row) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise FitError(f"{path} is no such measurement ({error}): see the layout in `{__name__}`") from error
    if not rows:
        raise FitError(f"{path} has no rows")
    return rows
