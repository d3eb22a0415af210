"""How long steps take: measured times of the programs, how far the device drifts from them; a roofline of others."""

from sarathi_jax.latency.devices import (
    DEVICES,
    PUBLISHED_STACK,
    Device,
    DeviceError,
    HostTerm,
    Kernels,
    Link,
    device_of,
    load_device,
    save_device,
)
from sarathi_jax.latency.forecast import Backlog, time_to_first_token_s
from sarathi_jax.latency.roofline import Roofline
from sarathi_jax.latency.table import LatencyTable, Spread, TableError, Timing
from sarathi_jax.latency.times import StepTimes
from sarathi_jax.latency.work import Work, chunk_keys

__all__ = [
    "DEVICES",
    "PUBLISHED_STACK",
    "Backlog",
    "Device",
    "DeviceError",
    "HostTerm",
    "Kernels",
    "LatencyTable",
    "Link",
    "Roofline",
    "Spread",
    "StepTimes",
    "TableError",
    "Timing",
    "Work",
    "chunk_keys",
    "device_of",
    "load_device",
    "save_device",
    "time_to_first_token_s",
]
