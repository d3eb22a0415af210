"""Arrays on their way to the devices of a stage: from the host, and from the devices of another stage."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sarathi_jax.parallel.tensor import AXIS

_ENDS = "pp"


class Transfer:
    """A compiled program that sends each device's part of an array to the device at the same place of another mesh.

    It is a collective permutation over both meshes, for that works across processes too, where a copy from device to
    device does not: every process that has a device of either calls `run`, in the same order.

    Args:
      source, target: meshes of one size.
      shape: of the part of one device.
      dtype: of the array.
      spec: how the parts make the array on the target, `P(AXIS)` or, where every device has all of it, `P()`.
    """

    def __init__(self, source: Mesh, target: Mesh, shape: tuple[int, ...], dtype: np.dtype, spec: P):
        both = Mesh(np.stack([source.devices, target.devices]), (_ENDS, AXIS))
        parts = P((_ENDS, AXIS))
        self._sharding = NamedSharding(both, parts)
        self._shape = (both.size * shape[0], *shape[1:])
        self._target = NamedSharding(target, spec)
        self._result_shape = shape if spec == P() else (target.size * shape[0], *shape[1:])
        own = [device for device in target.devices.flat if device.process_index == jax.process_index()]
        # The other end of the permutation needs an input of the same shape.
        self._empty = {device: jax.device_put(np.zeros(shape, dtype), device) for device in own}
        move = jax.shard_map(
            lambda x: lax.ppermute(x, _ENDS, [(0, 1)]), mesh=both, in_specs=parts, out_specs=parts, check_vma=False
        )
        argument = jax.ShapeDtypeStruct(self._shape, dtype, sharding=self._sharding)
        self.program = jax.jit(move).lower(argument).compile()

    def run(self, array: jax.Array | None) -> jax.Array | None:
        """Starts the transfer and returns at once.

        Args:
          array: on the source; None in a process that has none of its devices.

        Returns:
          The array on the target; None in a process that has none of its devices.
        """
        sent = [] if array is None else [shard.data for shard in array.addressable_shards]
        moved = self.program(
            jax.make_array_from_single_device_arrays(self._shape, self._sharding, sent + list(self._empty.values()))
        )
        if not self._empty:
            return None
        parts = [shard.data for shard in moved.addressable_shards if shard.device in self._empty]
        return jax.make_array_from_single_device_arrays(self._result_shape, self._target, parts)


def put_everywhere(values: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """All of an array on every device, of which some may belong to other processes, which do the same.

    Args:
      values: not changed afterwards: on a CPU the array may be the same memory.
      sharding: a replicated one.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def split_flat(x: jax.Array, axis: str | None, num_devices: int) -> jax.Array:
    """One device's part of an array that all devices of a mesh axis have: [ceil(size / num_devices)].

    So the devices of a stage send each number once between them, not once each.
    """
    if axis is None:
        return x.reshape(-1)
    length = -(-x.size // num_devices)
    flat = jnp.pad(x.reshape(-1), (0, num_devices * length - x.size))
    return lax.dynamic_slice(flat, (lax.axis_index(axis) * length,), (length,))


def join_flat(part: jax.Array, axis: str | None, shape: tuple[int, ...]) -> jax.Array:
    """The whole array of that shape again, on every device of the axis."""
    if axis is not None:
        with jax.named_scope("gather_hidden"):
            part = lax.all_gather(part, axis, tiled=True)
    return part[: int(np.prod(shape))].reshape(shape)
