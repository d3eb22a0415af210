"""Fits the constants of a device to measured kernel times, and writes them for the roofline of a simulation.

Measurements are CSV files. Times of products [m, k] x [k, n] in milliseconds, whoever measured them:
  m,k,n,ms
  512,4096,12288,0.241
or the layout of vidur's profiles (num_tokens, time_stats.<kernel>.median, ...), several files of one device:
  PROGRAM calibrate --products mine.csv --device h100 --name my-h100 --out my-h100.yaml
  PROGRAM calibrate --products llama.csv --products codellama.csv --device a100-80gb --out a100.yaml

Kernels that only move bytes (norms, activations) are fitted where the file has them: vidur's layout does.

--device is where the fit starts: a known device or such a file; its peaks, memory and links are kept unless flags say
otherwise. Times of messages fit the links, columns bytes,ms, or vidur's layout:
  PROGRAM calibrate --device a100.yaml --all_reduce nvlink.csv --num_devices 4 --out a100.yaml

The file goes to a simulation: PROGRAM simulate --device my-h100.yaml
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from sarathi_jax.cli.fields import UsageError
from sarathi_jax.latency import Device, Link, device_of, save_device
from sarathi_jax.latency.fit import (
    FitError,
    LayerTime,
    fit_kernels,
    fit_link,
    layer_errors,
    read_layer_times,
    read_messages,
    read_products,
    read_sizes,
    stack_gemms,
)

SUMMARY = "fits a device's constants to measured kernel times"

_PEAKS = {"peak_tflops": ("peak_flops", 1e12), "bandwidth_gb_s": ("bandwidth", 1e9), "memory_gb": ("memory_bytes", 1e9)}


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""
    flags.DEFINE_multi_string("products", None, "CSV file of kernel times; may be repeated", flag_values=values)
    flags.DEFINE_string("all_reduce", None, "CSV file of sums over devices: bytes,ms.", flag_values=values)
    flags.DEFINE_integer("num_devices", None, "that took part in --all_reduce.", flag_values=values)
    flags.DEFINE_integer(
        "devices_per_node", None, "of the times to take from files in vidur's layout.", flag_values=values
    )
    flags.DEFINE_string("send", None, "CSV file of messages from one device to another: bytes,ms.", flag_values=values)
    flags.DEFINE_string("device", None, "known device, or file, that the fit starts from.", flag_values=values)
    flags.DEFINE_string("name", None, "of the result; without it as --device.", flag_values=values)
    flags.DEFINE_float("peak_tflops", None, "dense, of the products' type, as published.", flag_values=values)
    flags.DEFINE_float("bandwidth_gb_s", None, "of its memory, as published.", flag_values=values)
    flags.DEFINE_float("memory_gb", None, "of its memory.", flag_values=values)
    flags.DEFINE_string("out", None, "file for the device (.yaml).", flag_values=values)


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Fits; returns the exit status."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; everything is given by flags")
    if not (values.products or values.all_reduce or values.send):
        raise UsageError("nothing to fit to: give --products, --all_reduce or --send, CSV files of measured times")
    if values.device is None:
        raise UsageError("--device is missing: where the fit starts, such as a100-80gb; see --help")
    if (values.all_reduce is None) != (values.num_devices is None):
        raise UsageError("--all_reduce and --num_devices go together: how many devices summed")
    if values.num_devices is not None and values.num_devices < 2:
        raise UsageError(f"--num_devices={values.num_devices}: a sum is over at least 2 devices")
    device = _started(values)
    if values.products:
        times = _layer_times([Path(name).expanduser() for name in values.products])
        device = dataclasses.replace(device, kernels=fit_kernels(times, device), fitted=True)
        print(f"{device.kernels}\n\n{error_text(times, device)}")
    if values.all_reduce is not None and values.num_devices is not None:
        number = values.num_devices
        messages = _messages(Path(values.all_reduce).expanduser(), number, values.devices_per_node or number)
        link = fit_link(messages, number)
        device = dataclasses.replace(device, links=_with_link(device, number, link))
        predicted = [link.all_reduce_s(num_bytes, number) for num_bytes, _ in messages]
        print(f"sum over {number} devices: {link}; {_mean_error(predicted, messages)}")
    if values.send is not None:
        messages = _messages(Path(values.send).expanduser(), 2, values.devices_per_node or 2)
        device = dataclasses.replace(device, send=fit_link(messages))
        predicted = [device.send.send_s(num_bytes) for num_bytes, _ in messages]
        print(f"send: {device.send}; {_mean_error(predicted, messages)}")
    if values.out is not None:
        out = Path(values.out).expanduser()
        save_device(device, out)
        print(f"\nwritten to {out}")
    return 0


def error_text(times: Sequence[LayerTime], device: Device) -> str:
    """A line a number of tokens: mean error of a layer's products, summed, and the largest."""
    gemms, seconds = stack_gemms(times), np.array([time.gemm_s for time in times])
    errors = np.abs(layer_errors(gemms, seconds, device, device.kernels))
    tokens = np.array([time.num_tokens for time in times])
    lines = [f"{'tokens':>8}{'layers':>8}{'mean error':>12}{'largest':>10}"]
    for low, high in _ranges(tokens):
        of_size = errors[(low <= tokens) & (tokens <= high)]
        name = f"{low}" if low == high else f"{low}-{high}"
        lines.append(f"{name:>8}{len(of_size):>8}{of_size.mean():>12.1%}{of_size.max():>10.1%}")
    lines.append(f"{'all':>8}{len(errors):>8}{errors.mean():>12.1%}{errors.max():>10.1%}")
    return "\n".join(lines)


def _ranges(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Least and greatest of the sizes between powers of two that occur."""
    sizes, groups = sorted(set(tokens.tolist())), {}
    for size in sizes:
        groups.setdefault((size - 1).bit_length(), []).append(size)
    return [(group[0], group[-1]) for group in groups.values()]


def _started(values: flags.FlagValues) -> Device:
    """The device to start from, with what the flags say of its peaks."""
    changes: dict[str, float | str] = {} if values.name is None else {"name": values.name}
    for flag, (field, unit) in _PEAKS.items():
        value = getattr(values, flag)
        if value is not None:
            if not 0 < value < float("inf"):
                raise UsageError(f"--{flag}={value:g} must be above 0")
            changes[field] = int(value * unit) if field == "memory_bytes" else value * unit
    return dataclasses.replace(device_of(values.device), **changes)


def _layer_times(paths: Sequence[Path]) -> list[LayerTime]:
    """Of files of one layout."""
    times: list[LayerTime] = []
    for path in paths:
        times += read_products(path) if "ms" in _columns(path) else read_layer_times(path)
    if len({len(time.gemms) for time in times}) > 1:
        raise FitError("--products: times of single products and of layers cannot go into one fit")
    return times


def _messages(path: Path, num_devices: int, devices_per_node: int) -> list[tuple[float, float]]:
    return read_sizes(path) if "ms" in _columns(path) else read_messages(path, num_devices, devices_per_node)


def _columns(path: Path) -> set[str]:
    """Of a CSV file, by which its layout is told."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return {name.strip() for name in file.readline().split(",")}


def _with_link(device: Device, num_devices: int, link: Link) -> tuple[tuple[int, Link], ...]:
    return tuple(sorted({**dict(device.links), num_devices: link}.items(), key=lambda item: item[0]))


def _mean_error(predicted: Sequence[float], messages: Sequence[tuple[float, float]]) -> str:
    errors = [abs(ours / seconds - 1) for ours, (_, seconds) in zip(predicted, messages, strict=True)]
    return f"mean error {sum(errors) / len(errors):.1%} of {len(errors)} messages"
