"""What devices and the links between them can do: published peaks, and which share of them kernels reach.

The constants of the A100 and the A40 are fitted (`sarathi_jax.latency.fit`) to published kernel times; nothing here was
chosen by looking at a capacity.
"""

import dataclasses


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
      memory_bytes: of it.
      kernels: what is reached.
      links: (most devices of a group, the link between them), ascending.
      fitted: whether `kernels` comes from this device's own measurements.
    """

    name: str
    peak_flops: float
    bandwidth: float
    memory_bytes: int
    kernels: Kernels
    links: tuple[tuple[int, Link], ...]
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
    """What a serving stack adds to its kernels: Python between them, kernels slower than profiled alone.

    Attributes:
      step_s: each step.
      sequence_s: each sequence of a step.
      device_factor: the stack's kernel times to those of the same kernels profiled alone.
      attention_flops: share of the peak that its attention reaches; None: as of the device.
    """

    step_s: float = 0.0
    sequence_s: float = 0.0
    device_factor: float = 1.0
    attention_flops: float | None = None

DEVICES: dict[str, Device] = {}
