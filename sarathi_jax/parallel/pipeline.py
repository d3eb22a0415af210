"""Pipeline parallelism: each stage has some consecutive layers, on devices of its own.

Steps enter one after another and move on by one stage a tick, so that as many micro-batches are in flight as there are
stages (Sarathi-Serve, section 3.3).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sarathi_jax.config import ConfigError, EngineConfig, ModelConfig
from sarathi_jax.parallel.tensor import AXIS, TensorSplit


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage has of a model.

    Attributes:
      index: its place, from 0.
      num_stages: pp.
      layers: of the model; the embedding is with the first stage, norm and head are with the last.
    """

    index: int
    num_stages: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


def split_layers(model: ModelConfig, engine: EngineConfig) -> tuple[Stage, ...]:
    """The stages of a pipeline, as `pp_layers` says or else such that the slowest is as quick as can be.

    The time of a stage is taken to be proportional to the weights that its products read: the head counts as much as
    its weights do in layers, the embedding is looked up and counts nothing.

    Raises:
      ConfigError: fewer layers than stages, or `pp_layers` does not fit; says what would.
    """
    if engine.pp > model.num_layers:
        raise ConfigError(
            f"pp={engine.pp}: the model's {model.num_layers} layers make at most {model.num_layers} stages: lower pp"
        )
    sizes = _balanced(model, engine.pp) if engine.pp_layers is None else engine.pp_layers
    if len(sizes) != engine.pp or sum(sizes) != model.num_layers:
        example = ",".join(map(str, _balanced(model, engine.pp)))
        raise ConfigError(
            f"pp_layers={','.join(map(str, sizes))} must be {engine.pp} numbers (pp) that add up to the model's "
            f"{model.num_layers} layers, such as {example}"
        )
    ends = np.cumsum((0, *sizes)).tolist()
    return tuple(Stage(i, engine.pp, range(ends[i], ends[i + 1])) for i in range(engine.pp))


def _balanced(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage: one each, then one at a time to the stage that it leaves the cheapest."""
    head_layers = model.vocab_size * model.hidden_size / _layer_weights(model)
    costs = np.ones(num_stages)
    costs[-1] += head_layers
    for _ in range(model.num_layers - num_stages):
        costs[np.argmin(costs)] += 1
    costs[-1] -= head_layers
    return tuple(np.rint(costs).astype(int).tolist())


def _layer_weights(model: ModelConfig) -> int:
    attention = model.hidden_size * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    return attention + model.hidden_size * model.intermediate_size * (2 if model.architecture == "falcon" else 3)


def check_split(model: ModelConfig, engine: EngineConfig) -> None:
    """Refuses what no devices can serve.

    Raises:
      ConfigError: the model cannot be split by this tp or pp; says what would work.
    """
    TensorSplit(model, engine.tp)
    split_layers(model, engine)


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
