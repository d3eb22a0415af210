"""Pipeline parallelism: each stage has some consecutive layers, on devices of its own.

Steps enter one after another and move on by one stage a tick, so that as many micro-batches are in flight as there are
stages (Sarathi-Serve, section 3.3).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sarathi_jax.config import ConfigError, EngineConfig, ModelConfig
from sarathi_jax.parallel.tensor import AXIS
from sarathi_jax.partition import TensorSplit, check_split


def make_meshes(model: ModelConfig, engine: EngineConfig, devices: Sequence[Any]) -> tuple[Mesh, ...]:
    """A row of `tp` devices for each stage of a replica.

    Args:
      model: what is to be served.
      engine: tp and pp.
      devices: of this replica, those of one process next to each other.

    Raises:
      ConfigError: the model cannot be split so, or there are fewer devices; says what would work.
    """
    check_split(model, engine)
    needed = engine.tp * engine.pp
    if needed > len(devices):
        hint = ""
        if devices[0].platform == "cpu":
            hint = f"; JAX_NUM_CPU_DEVICES={needed * engine.dp} makes virtual ones"
        replicas, each = (f" for each of dp={engine.dp} replicas", " each") if engine.dp > 1 else ("", "")
        raise ConfigError(
            f"tp={engine.tp} x pp={engine.pp} need {needed} devices{replicas}, there are {len(devices)}{each} "
            f"({devices[0].device_kind}); this model can have {_what_fits(model, len(devices))}{hint}"
        )
    processes = {device.process_index for device in devices[:needed]}
    if idle := sorted({device.process_index for device in devices} - processes):
        raise ConfigError(
            f"tp={engine.tp} x pp={engine.pp} need {needed} devices, which leaves process {idle[0]} without any: this "
            f"model can have {_what_fits(model, len(devices))} on the {len(devices)} devices of all hosts; or start "
            "fewer hosts"
        )
    return tuple(Mesh(row, (AXIS,)) for row in np.asarray(devices[:needed]).reshape(engine.pp, engine.tp))


def is_local(mesh: Mesh) -> bool:
    """Whether this process has devices of a mesh."""
    return any(device.process_index == jax.process_index() for device in mesh.devices.flat)


def _what_fits(model: ModelConfig, num_devices: int) -> str:
    """The splits that use the most devices, in words."""
    fits = [(tp, min(num_devices // tp, model.num_layers)) for tp in TensorSplit.sizes(model) if tp <= num_devices]
    most = max(tp * pp for tp, pp in fits)
    return " or ".join(f"tp={tp} pp={pp}" for tp, pp in fits if tp * pp == most)
