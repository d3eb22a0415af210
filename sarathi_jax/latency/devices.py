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
    """What a serving stack adds to its kernels: ``max(kernels, launch_s) + step_s + sequence_s * sequences``.

    Attributes:
      launch_s: the host needs it to launch a step's kernels, while the first of them run already.
      step_s: each step, while the device waits.
      sequence_s: each sequence of a step, likewise.
      attention_flops: share of the peak that its attention reaches; None: as of the device.
      masked_share: share of the pairs within a chunk that the causal mask hides and its attention computes all the same.
    """

    launch_s: float = 0.0
    step_s: float = 0.0
    sequence_s: float = 0.0
    attention_flops: float | None = None
    masked_share: float = 0.0


_A100_KERNELS = Kernels(0.7465, 0.9155, 6.26e-6, 1.828, 128, 0.692, (), 0.511, 2.38e-6)
_A40_KERNELS = Kernels(0.7840, 0.8187, 6.37e-6, 1.835, 128, 0.477, (), 0.778, 0.91e-6)
# Of devices without published kernel times: what the two fitted ones reach on average.
_MEAN_KERNELS = Kernels(0.765, 0.867, 6.3e-6, 1.83, 128, 0.58, (), 0.64, 1.6e-6)
_CPU_KERNELS = Kernels(0.8, 0.8, 5e-6, 1.83, 8, 1.0, (), 0.8, 5e-6)

NVLINK_PAIR = Link(34.7e-6, 193e9)  # two A100, fitted to all-reduces
NVLINK_PAIRS = Link(57.6e-6, 23.7e9)  # four A100, NVLink within pairs, PCIe between them, fitted
NVSWITCH = Link(43.8e-6, 174e9)  # four A100 of a DGX, fitted; eight reach 154e9
NODES_4 = Link(214e-6, 21.8e9)  # all-reduce over two nodes of four A100, fitted
ETHERNET_100G = Link(27.9e-6, 7.76e9)  # one node to another, fitted to sends
# Published; latencies as of NVSwitch.
_NVLINK_4 = Link(43.8e-6, 350e9)
_ICI = Link(10e-6, 45e9)
_MEMORY = Link(20e-6, 5e9)

DEVICES = {
    device.name: device
    for device in (
        Device("a100-80gb", 312e12, 2.039e12, 80 << 30, _A100_KERNELS, ((2, NVLINK_PAIR), (4, NVLINK_PAIRS), (8, NODES_4)), True),
    )
}
