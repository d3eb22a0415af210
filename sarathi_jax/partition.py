"""Which part of a model each device has: some layers of a pipeline's stage, of these some heads and inner units.

Nothing here knows a device, so that whoever plans a deployment need not have one; `sarathi_jax.parallel` puts the parts
where they belong.
"""

import dataclasses

import numpy as np

from sarathi_jax.config import ConfigError, EngineConfig, ModelConfig


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
