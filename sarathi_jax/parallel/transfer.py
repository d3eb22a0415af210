"""Arrays on their way to the devices of a stage: from the host, and from the devices of another stage."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sarathi_jax.parallel.tensor import AXIS

_ENDS = "pp"
_PARTS = P((_ENDS, AXIS))


def join_meshes(source: Mesh, target: Mesh) -> Mesh:
    """The mesh of both ends of a transfer."""
    return Mesh(np.stack([source.devices, target.devices]), (_ENDS, AXIS))


def lower_transfer(both: Mesh, shape: tuple[int, ...], dtype: np.dtype) -> jax.stages.Lowered:
    """Lowers the program of a `Transfer` from shapes alone.

    Args:
      both: of `join_meshes`, of devices that may be there or not.
      shape, dtype: as of `Transfer`.
    """
    move = jax.shard_map(
        lambda x: lax.ppermute(x, _ENDS, [(0, 1)]), mesh=both, in_specs=_PARTS, out_specs=_PARTS, check_vma=False
    )
    whole = (both.size * shape[0], *shape[1:])
    return jax.jit(move).lower(jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(both, _PARTS)))


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
        both = join_meshes(source, target)
        self._sharding = NamedSharding(both, _PARTS)
        self._shape = (both.size * shape[0], *shape[1:])
        self._target = NamedSharding(target, spec)
        self._result_shape = shape if spec == P() else (target.size * shape[0], *shape[1:])
        own = [device for device in target.devices.flat if device.process_index == jax.process_index()]
        # The other end of the permutation needs an input of the same shape.
        self._empty = {device: jax.device_put(np.zeros(shape, dtype), device) for device in own}
        self.program = lower_transfer(both, shape, dtype).compile()

    def run(self, array: jax.Array | None) -> jax.Array | None:
        """Starts the transfer and returns at once.

        Args:
          array: on the source; None in a process that has none of its devices.

        Returns:
          The array on the target; None in a process that has none of its devices.
        """
        sent = [] if array is None else [shard.data for shard in array.addressable_shards]
        parts = sent + list(self._empty.values())
        moved = in_turn(self.program(jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)))
        if not self._empty:
            return None
        parts = [shard.data for shard in moved.addressable_shards if shard.device in self._empty]
        return jax.make_array_from_single_device_arrays(self._result_shape, self._target, parts)


def in_turn[T](result: T) -> T:
    """Keeps programs in order where the devices do not; every program that is enqueued passes through here.

    XLA's CPU client starts whatever has its inputs. Where an exchange with another process overtakes the program before
    it, the two processes may each wait in an exchange for which the other has no thread left.

    Args:
      result: of a program that was just enqueued.
    """
    several_cpus = jax.process_count() > 1 and jax.default_backend() == "cpu"
    return jax.block_until_ready(result) if several_cpus else result


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
