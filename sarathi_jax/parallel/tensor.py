"""Tensor parallelism: each device of a mesh has a part of every layer, of the cache and of the vocabulary.

Products come in pairs (Megatron-LM, arXiv 1909.08053): the first is split by its outputs (heads, inner units), the
second by its inputs, so that a pair ends in one sum over the devices. With more devices than KV heads a KV head is on
several of them, each with some of its query heads.
"""

import dataclasses
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sarathi_jax.config import ConfigError, ModelConfig

AXIS = "tp"

# Last components of a parameter's path -> how it is split; whatever is not listed is on every device.
_SPECS = {
    "embed.weight": P(AXIS),
    "head.weight": P(AXIS),
    "head.scale": P(AXIS),
    "attn.qkv.weight": P(AXIS),
    "attn.qkv.scale": P(AXIS),
    "attn.qkv.bias": P(AXIS),
    "attn.out.weight": P(None, AXIS),
    "mlp.gate_up.weight": P(None, AXIS),
    "mlp.gate_up.scale": P(None, AXIS),
    "mlp.gate_up.bias": P(None, AXIS),
    "mlp.up.weight": P(AXIS),
    "mlp.up.scale": P(AXIS),
    "mlp.up.bias": P(AXIS),
    "mlp.down.weight": P(None, AXIS),
}

CACHE_SPEC = P(None, AXIS)
"""Of keys and of values, [blocks, kv_heads, block_size, head_dim]."""


def spec_of(path: str) -> P:
    """How a parameter is split."""
    return _SPECS.get(re.sub(r"^layers\.\d+\.", "", path), P())


@dataclasses.dataclass(frozen=True)
class TensorSplit:
    """A model over `size` devices.

    Attributes:
      model: as published.
      size: devices, tp.

    Raises:
      ConfigError: the model cannot be split so; names the sizes that work.
    """

    model: ModelConfig
    size: int

    def __post_init__(self):
        if problem := self._problem(self.model, self.size):
            works = ", ".join(map(str, self.sizes(self.model)))
            raise ConfigError(f"tp={self.size}: {problem}; tp may be {works}")

    @classmethod
    def sizes(cls, model: ModelConfig) -> list[int]:
        """Every number of devices over which a model can be split."""
        return [size for size in range(1, model.num_heads + 1) if not cls._problem(model, size)]

    @staticmethod
    def _problem(model: ModelConfig, size: int) -> str | None:
        if size < 1:
            return "there must be at least one device"
        if model.num_heads % size:
            return f"{model.num_heads} query heads cannot be split evenly"
        if model.num_kv_heads % size and size % model.num_kv_heads:
            return f"{model.num_kv_heads} KV heads can be neither split nor repeated evenly"
        if model.intermediate_size % size:
            return f"{model.intermediate_size} inner units of an MLP cannot be split evenly"
        return None

    @property
    def kv_copies(self) -> int:
        """Devices that have the same KV head."""
        return max(1, self.size // self.model.num_kv_heads)

    @property
    def widened(self) -> ModelConfig:
        """The model whose arrays split evenly: KV heads repeated for each device, the vocabulary filled up."""
        vocab_size = -(-self.model.vocab_size // self.size) * self.size
        return dataclasses.replace(
            self.model, num_kv_heads=self.model.num_kv_heads * self.kv_copies, vocab_size=vocab_size
        )

    @property
    def local(self) -> ModelConfig:
        """What one device has of it."""
        model = self.widened
        return dataclasses.replace(
            model,
            num_heads=model.num_heads // self.size,
            num_kv_heads=model.num_kv_heads // self.size,
            intermediate_size=model.intermediate_size // self.size,
            vocab_size=model.vocab_size // self.size,
        )

    def widen(self, path: str, values: np.ndarray) -> np.ndarray:
        """A parameter of the published model as one of `widened`.

        Args:
          path: of the parameter.
          values: as `ModelFunction.shapes` of the published model has it.
        """
        if path.endswith(("embed.weight", "head.weight", "head.scale")):
            missing = self.widened.vocab_size - self.model.vocab_size
            return np.pad(values, ((0, missing), *((0, 0),) * (values.ndim - 1))) if missing else values
        if ".attn.qkv." in path and self.kv_copies > 1:
            groups, copies, heads = self.model.num_kv_heads, self.kv_copies, self.model.heads_per_kv
            rest = values.shape[2:]
            queries = values[:, :heads].reshape(groups, copies, heads // copies, *rest)
            kv = np.broadcast_to(values[:, None, heads:], (groups, copies, 2, *rest))
            return np.concatenate([queries, kv], axis=2).reshape(groups * copies, heads // copies + 2, *rest)
        return values

    def put(self, mesh: Mesh, path: str, values: np.ndarray) -> jax.Array:
        """A parameter on the devices, each of which gets its own part alone.

        Args:
          mesh: of `make_mesh`.
          path, values: as in `widen`.
        """
        values = self.widen(path, values)
        sharding = NamedSharding(mesh, spec_of(path))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
