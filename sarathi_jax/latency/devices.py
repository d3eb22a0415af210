"""What devices and the links between them can do: published peaks, and which share of them kernels reach.

The constants of the A100 and the A40 are fitted (`sarathi_jax.latency.fit`) to published kernel times; nothing here was
chosen by looking at a capacity.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sarathi_jax.config import ConfigError, read_yaml


@dataclasses.dataclass(frozen=True)
class Link:
    """Time of a message: ``latency_s + bytes / bandwidth``.

    Attributes:
      latency_s: of an empty message.
      bandwidth: bytes a second; of an all-reduce over n devices each sends ``2 (n - 1) / n`` of its message.
    """

    latency_s: float
    bandwidth: float

    def send_s(self, num_bytes: float) -> float:
        """Seconds from one device to another."""
        return self.latency_s + num_bytes / self.bandwidth

    def all_reduce_s(self, num_bytes: float, num_devices: int) -> float:
        """Seconds of a sum over devices that all of them get."""
        if num_devices == 1:
            return 0.0
        return self.latency_s + 2 * (num_devices - 1) / num_devices * num_bytes / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Shares of a device's peaks that kernels reach: ``((F / flops)^p + (B / bytes)^p)^(1/p) + launch_s``.

    F and B are the seconds that a product's flops and bytes take at the peaks.

    Attributes:
      flops, bytes: shares of the peaks.
      launch_s: of a kernel that does nothing.
      sharpness: the exponent p: 1 adds both, infinity takes the larger.
      tile: rows of a product's tile; started ones count as far as `tile_share` says.
      tile_share: 0: only the rows there are cost flops; 1: every started tile does in full.
      by_tokens: (rows, measured time to this formula's), ascending: libraries change kernels with the rows, and at some
        sizes to slower ones; straight lines over the logarithm of the rows.
      stream_bytes, stream_launch_s: likewise of norms, activations, rotations and sums, which only move bytes.
      attention_flops: share of the peak that attention reaches (no kernel times of attention are published with the
        others; this is an assumption unless it was fitted to iterations).
    """

    flops: float
    bytes: float
    launch_s: float
    sharpness: float
    tile: int = 128
    tile_share: float = 0.0
    by_tokens: tuple[tuple[int, float], ...] = ()
    stream_bytes: float = 0.5
    stream_launch_s: float = 3e-6
    attention_flops: float = 0.5


@dataclasses.dataclass(frozen=True)
class Device:
    """A device and its neighbours.

    Attributes:
      name: as in `DEVICES`.
      peak_flops: a second, dense, of the products' type.
      bandwidth: of its memory, bytes a second.
      memory_bytes: of it, as its driver reports it (of the H100 and the TPU the nominal size).
      kernels: what is reached.
      links: (most devices of a group, the link between them), ascending.
      send: from a stage to the next.
      fitted: whether `kernels` comes from this device's own measurements.
    """

    name: str
    peak_flops: float
    bandwidth: float
    memory_bytes: int
    kernels: Kernels
    links: tuple[tuple[int, Link], ...]
    send: Link
    fitted: bool = False

    def link(self, num_devices: int) -> Link:
        """The link that joins a group of so many devices.

        Raises:
          ValueError: no link joins so many.
        """
        for most, link in self.links:
            if num_devices <= most:
                return link
        raise ValueError(f"no link joins {num_devices} {self.name}: at most {self.links[-1][0]}; name the link")


@dataclasses.dataclass(frozen=True)
class HostTerm:
    """What a serving stack adds to its kernels: ``max(kernels, layers * launch_s) + step_s + sequence_s * sequences``.

    Attributes:
      launch_s: the host needs it to launch a layer's kernels, while earlier ones run.
      step_s: each step, while the device waits.
      sequence_s: each sequence of a step, likewise.
      attention_flops: share of the peak that its attention reaches; None: as of the device.
      masked_share: share of the pairs of a chunk that the causal mask hides and that are computed all the same.
    """

    launch_s: float = 0.0
    step_s: float = 0.0
    sequence_s: float = 0.0
    attention_flops: float | None = None
    masked_share: float = 0.0


# Fitted to the kernel times that vidur publishes (three models, tp 1 to 8).
_A100_KERNELS = Kernels(
    flops=0.7465,
    bytes=0.9155,
    launch_s=6.26e-6,
    sharpness=1.828,
    tile_share=0.692,
    by_tokens=(
        (1, 1.074),
        (8, 1.027),
        (64, 0.898),
        (96, 1.019),
        (128, 0.968),
        (192, 0.972),
        (256, 0.978),
        (384, 0.971),
        (512, 1.011),
        (768, 1.005),
        (1024, 1.061),
        (1280, 0.964),
        (1536, 1.006),
        (2048, 0.993),
        (3072, 1.004),
        (4096, 0.975),
    ),
    stream_bytes=0.511,
    stream_launch_s=2.38e-6,
)
_A40_KERNELS = Kernels(
    flops=0.7840,
    bytes=0.8187,
    launch_s=6.37e-6,
    sharpness=1.835,
    tile_share=0.477,
    by_tokens=(
        (1, 1.021),
        (8, 1.021),
        (64, 1.033),
        (96, 1.0),
        (128, 0.959),
        (192, 0.925),
        (256, 0.9),
        (384, 0.966),
        (512, 1.037),
        (768, 0.979),
        (1024, 1.03),
        (1280, 0.98),
        (1536, 0.976),
        (2048, 1.004),
        (3072, 1.017),
        (4096, 1.043),
    ),
    stream_bytes=0.778,
    stream_launch_s=0.91e-6,
)
# Of devices without published kernel times: what these two reach on average.
_MEAN_KERNELS = Kernels(
    flops=0.765,
    bytes=0.867,
    launch_s=6.3e-6,
    sharpness=1.83,
    tile_share=0.58,
    stream_bytes=0.64,
    stream_launch_s=1.6e-6,
)

# Fitted to the messages that vidur publishes.
NVLINK_PAIR = Link(34.7e-6, 193e9)  # all-reduce of two A100
NVLINK_PAIRS = Link(57.6e-6, 23.7e9)  # of four A100: NVLink within pairs, PCIe between them
NVSWITCH = Link(43.8e-6, 174e9)  # of four A100 of a DGX; eight reach 154e9
TWO_NODES = Link(214e-6, 21.8e9)  # of eight A100, four a node
ETHERNET_100G = Link(27.9e-6, 7.76e9)  # a send from one node to another
A40_SEND = Link(0.5e-6, 4.08e9)  # a send within a node of A40
# No times are published of these: nominal bandwidths, latencies as of the fitted ones.
_HOPPER_NVSWITCH = Link(43.8e-6, 360e9)
_TPU_ICI = Link(10e-6, 45e9)
_SAME_MEMORY = Link(20e-6, 5e9)

_A100_LINKS = ((2, NVLINK_PAIR), (4, NVLINK_PAIRS), (8, TWO_NODES))
# All-reduces of A40 are not published: an assumption, since PCIe joins their pairs as it joins those of the A100.
_A40_LINKS = ((2, NVLINK_PAIR), (8, NVLINK_PAIRS))

DEVICES = {
    device.name: device
    for device in (
        Device("a100-80gb", 312e12, 2.039e12, 85_100_068_864, _A100_KERNELS, _A100_LINKS, ETHERNET_100G, fitted=True),
        Device("a40", 149.7e12, 0.696e12, 47_600_000_000, _A40_KERNELS, _A40_LINKS, A40_SEND, fitted=True),
        Device("h100", 989e12, 3.35e12, 80 << 30, _MEAN_KERNELS, ((8, _HOPPER_NVSWITCH),), _HOPPER_NVSWITCH),
        Device("h200", 989e12, 4.8e12, 151_397_597_184, _MEAN_KERNELS, ((8, _HOPPER_NVSWITCH),), _HOPPER_NVSWITCH),
        Device("tpu-v5e", 197e12, 0.819e12, 16 << 30, _MEAN_KERNELS, ((256, _TPU_ICI),), _TPU_ICI),
        # Two cores of 2.5 GHz with AVX-512, nominal: `main.py profile` measures what this machine really does.
        Device("cpu", 320e9, 20e9, 8 << 30, _MEAN_KERNELS, ((8, _SAME_MEMORY),), _SAME_MEMORY),
    )
}

# The stack that the paper measured, fitted to the iterations of its artifact (Yi-34B, tp 2 on A100, prompts of at most
# 8k). An engine that keeps its device busy has none.
PUBLISHED_STACK = HostTerm(
    launch_s=0.6547e-3, step_s=6.27e-3, sequence_s=1.285e-3, attention_flops=0.316, masked_share=0.379
)


class DeviceError(ValueError):
    """A device that is not known, or a file that describes none; the message says what it should hold."""


def device_of(name: str) -> Device:
    """A device by its name in `DEVICES`, or by the path of a file, see `load_device`.

    Raises:
      DeviceError: neither.
    """
    if name in DEVICES:
        return DEVICES[name]
    if Path(name).expanduser().is_file():
        return load_device(Path(name).expanduser())
    near = [one for one in DEVICES if one.startswith(name)] or difflib.get_close_matches(name, DEVICES, n=1, cutoff=0.4)
    hint = f"do you mean {near[0]}? " if near else ""
    raise DeviceError(f"no device {name!r}, and no such file; {hint}known are {', '.join(DEVICES)}")


def save_device(device: Device, path: Path) -> None:
    """Writes a device as YAML, which `load_device` reads.

    Raises:
      OSError: it cannot be written.
    """
    document = dataclasses.asdict(device)
    document["links"] = [{"devices": most, **dataclasses.asdict(link)} for most, link in device.links]
    document["kernels"]["by_tokens"] = [list(pair) for pair in device.kernels.by_tokens]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def load_device(path: Path) -> Device:
    """Reads a device from YAML or JSON: the fields of `Device`, and links as a list of `devices`, `latency_s`,
    `bandwidth`.

    Raises:
      DeviceError: it cannot be read, or lacks something, or has a field that no device has.
    """
    try:
        document: dict[str, Any] = dict(read_yaml(path))
        kernels = dict(document.pop("kernels"))
        by_tokens = tuple((int(rows), float(share)) for rows, share in kernels.pop("by_tokens", None) or ())
        tile = int(kernels.pop("tile", Kernels.tile))
        links = tuple((int(link.pop("devices")), Link(**_numbers(link))) for link in map(dict, document.pop("links")))
        own: dict[str, Any] = {
            "name": str(document.pop("name")),
            "fitted": bool(document.pop("fitted", False)),
            "memory_bytes": int(float(document.pop("memory_bytes"))),
            "send": Link(**_numbers(document.pop("send"))),
            "kernels": Kernels(**_numbers(kernels), tile=tile, by_tokens=by_tokens),
        }
        device = Device(**own, **_numbers(document), links=links)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DeviceError(f"{path} describes no device: {text}") from error
    least = min(device.peak_flops, device.bandwidth, device.kernels.flops, device.kernels.bytes)
    if not least > 0 or not links:
        raise DeviceError(f"{path} describes no device: peaks and shares must be above 0, and links at least one")
    return device


def _numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(value) for name, value in fields.items()}
