"""Times of device work, and the two roofs that they are compared with.

Work is asynchronous: calls are queued without waiting and the last one is waited for, so that the host's part hides
behind the device's wherever the device is the slower one. Whether it was is measured too, and reported.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
      seconds: median over rounds.
      spread: (slowest - fastest round) / median: differences below it are noise.
      enqueue_s: what the host took to start a call; near `seconds` the host is what was measured.
    """

    seconds: float
    spread: float
    enqueue_s: float

    def row(self, calls: int = 1) -> dict[str, Any]:
        """Numbers of a result row, for one of `calls` equal pieces of the call."""
        return {
            "time_us": self.seconds / calls * 1e6,
            "spread": round(self.spread, 4),
            "host_bound": self.enqueue_s > 0.8 * self.seconds,
        }


def time_calls(step: Callable[[], Any], *, dry_run: bool, rounds: int = 5, round_s: float = 0.1) -> Timing:
    """Times `step`, which starts device work and returns arrays of it.

    Args:
      step: called again and again; it may keep state, such as a donated cache.
      dry_run: calls it once, and the time means nothing.
      rounds: how often; each long enough for `round_s`.
      round_s: seconds of a round, within 2 to 500 calls.
    """
    if dry_run:
        start_s = time.perf_counter()
        jax.block_until_ready(step())
        seconds = time.perf_counter() - start_s
        return Timing(seconds, 0.0, seconds)
    for _ in range(2):
        jax.block_until_ready(step())
    start_s = time.perf_counter()
    jax.block_until_ready(step())
    calls = int(np.clip(round_s / (time.perf_counter() - start_s), 2, 500))
    seconds, enqueue = [], []
    for _ in range(rounds):
        start_s = time.perf_counter()
        for _ in range(calls - 1):
            step()
        last = step()
        enqueued_s = time.perf_counter()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - start_s) / calls)
        enqueue.append((enqueued_s - start_s) / calls)
    median = statistics.median(seconds)
    return Timing(median, (max(seconds) - min(seconds)) / median, statistics.median(enqueue))


def kernel_times(function: Callable[..., Any], *arguments: Any, most: int = 8) -> list[dict[str, Any]]:
    """Device-clock times (CUPTI) of the kernels of one call, the longest first, those of one name added up.

    Raises:
      RuntimeError: this platform has no such profiler.
    """
    _, timings = profiler.measure(function, aggregate=False)(*arguments)
    by_name: dict[str, float] = {}
    for name, milliseconds in timings or ():
        by_name[name] = by_name.get(name, 0.0) + milliseconds * 1e3
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:most]
    return [{"kernel": name[:100], "time_us": time_us} for name, time_us in longest]


def device_works() -> bool:
    """Whether this process can still use its device: after an illegal access or the like it cannot."""
    try:
        return bool(jnp.arange(8).sum() == 28)
    except jax.errors.JaxRuntimeError:
        return False


@dataclasses.dataclass(frozen=True)
class Roofs:
    """What the device was seen to do: bytes a second of a large copy, operations a second of a large product."""

    bytes_s: float
    flops_s: float

    def floor_s(self, num_bytes: float, flops: float) -> float:
        """Seconds below which work of this size cannot end."""
        return max(num_bytes / self.bytes_s, flops / self.flops_s)

    def percent(self, seconds: float, num_bytes: float, flops: float) -> dict[str, float]:
        """Share of each roof that work of this size and time reached, and of the nearer one."""
        return {
            "percent_of_bandwidth": 100 * num_bytes / seconds / self.bytes_s,
            "percent_of_matrix_rate": 100 * flops / seconds / self.flops_s,
            "percent_of_roof": 100 * self.floor_s(num_bytes, flops) / seconds,
        }


def measure_roofs(dry_run: bool) -> dict[str, float]:
    """Copy bandwidth (bytes read plus written, several GB) and the bf16 rate of a square product, on random data."""
    copied, side = ((4, 64), 64) if dry_run else ((1 << 15, 1 << 15), 8192)
    source = jax.random.normal(jax.random.key(0), copied, jnp.bfloat16)
    copy = jax.jit(lambda x: -x)
    copying = time_calls(lambda: copy(source), dry_run=dry_run)
    reads = jax.jit(lambda x: jnp.max(x.astype(jnp.float32)))
    reading = time_calls(lambda: reads(source), dry_run=dry_run)
    num_bytes = source.nbytes
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in (1, 2))
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.bfloat16))
    multiplying = time_calls(lambda: multiply(a, b), dry_run=dry_run)
    return {
        "copy_bytes_s": 2 * num_bytes / copying.seconds,
        "read_bytes_s": num_bytes / reading.seconds,
        "matrix_flops_s": 2 * side**3 / multiplying.seconds,
        "copy_spread": copying.spread,
        "matrix_spread": multiplying.spread,
    }


def roofs_of(row: dict[str, float]) -> Roofs:
    """From what `measure_roofs` returned."""
    return Roofs(row["copy_bytes_s"], row["matrix_flops_s"])
