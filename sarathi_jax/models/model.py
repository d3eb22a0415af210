"""The whole model: embedding, layers of one architecture, last norm, head."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from sarathi_jax.config import ModelConfig, Quantization
from sarathi_jax.models.decoder import DecoderLayer
from sarathi_jax.models.falcon import FalconLayer
from sarathi_jax.models.layers import (
    Attend,
    Embedding,
    LayerNorm,
    LayerState,
    Linear,
    QuantizedLinear,
    RMSNorm,
    product,
    rotation_table,
)


class LanguageModel(nnx.Module):
    """A decoder-only model. Layers are unrolled: a scan over stacked layers copies each layer's weights on CPU.

    Args:
      config: the model; under a mesh axis, what one device has of it.
      dtype: of its parameters.
      axis: of the mesh over which its layers are split, or None.
      layers: the consecutive ones that this stage of a pipeline has; the embedding comes with the first of all, norm
        and head with the last. Parameters keep the names that they have in the whole model.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, axis: str | None, layers: range):
        layer_type, norm_type = (FalconLayer, LayerNorm) if config.architecture == "falcon" else (DecoderLayer, RMSNorm)
        has_end = layers.stop == config.num_layers
        has_embedding = layers.start == 0 or (has_end and config.tie_embeddings)
        has_head = has_end and not config.tie_embeddings
        self.config = config
        self.own_layers = layers
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype, axis) if has_embedding else None
        every = range(config.num_layers)
        self.layers = nnx.List([layer_type(config, dtype, axis) if i in layers else None for i in every])
        self.norm = norm_type(config.hidden_size, config.norm_eps, dtype) if has_end else None
        self.head = Linear((config.vocab_size, config.hidden_size), dtype) if has_head else None

    def hidden(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, state: list[LayerState]
    ) -> tuple[jax.Array, list[LayerState]]:
        """Everything but the head, of a whole model.

        Args:
          tokens: i32[T].
          positions: i32[T], index of each token in its sequence.
          attend: attention with whatever cache and mask it owns.
          state: what `attend` keeps, one entry a layer.

        Returns:
          f32[T, E] after the last norm, and the new state.
        """
        x, state = self.run_layers(self.embedded(tokens), positions, attend, state)
        return self.normed(x), state

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """Maps i32[T] to f32[T, E]; for the first stage."""
        assert self.embed is not None
        return self.embed(tokens)

    def run_layers(
        self, x: jax.Array, positions: jax.Array, attend: Attend, state: list[LayerState]
    ) -> tuple[jax.Array, list[LayerState]]:
        """The layers that are here: f32[T, E] -> f32[T, E]; other arguments as in `hidden`."""
        rotation = rotation_table(self.config, positions)
        new_state = []
        for i, layer_state in zip(self.own_layers, state, strict=True):
            layer = self.layers[i]
            assert layer is not None
            x, layer_state = layer(x, rotation, attend, i, layer_state)
            new_state.append(layer_state)
        return x, new_state

    def normed(self, x: jax.Array) -> jax.Array:
        """The last norm, f32[T, E] -> f32[T, E]; for the last stage."""
        assert self.norm is not None
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps f32[T, E] to f32[T, V], for the last stage; under a mesh axis V is of the device's own tokens."""
        if self.head is not None:
            return self.head(hidden)
        assert self.embed is not None
        return product(hidden, self.embed.weight[...])


class ModelFunction:
    """A model as a pure function of its parameters, a flat dict by dotted path: NNX stays inside this package.

    Args:
      config: the model.
      dtype: of its parameters.
      quantization: of the weights of its products, or None; a tied head is none of them.
      axis: of the mesh over which its layers are split, or None; `config` is then one device's part.
      layers: those of one stage of a pipeline; None: all.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        quantization: Quantization | None = None,
        axis: str | None = None,
        layers: range | None = None,
    ):
        def build() -> LanguageModel:
            model = LanguageModel(config, dtype, axis, range(config.num_layers) if layers is None else layers)
            if quantization is not None:
                _quantize(model, quantization)
            return model

        self._graph, state = nnx.split(nnx.eval_shape(build))
        self._leaves = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}

    @property
    def quantized(self) -> dict[str, jnp.dtype]:
        """Dotted path of every quantised weight -> what it is stored as; its scale is `scale_path` of it."""
        shapes = self.shapes
        return {name: leaf.dtype for name, leaf in shapes.items() if scale_path(name) in shapes}

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Dotted path -> shape and dtype of every parameter."""
        return {name: leaf.get_value() for name, (_, leaf) in self._leaves.items()}

    def bind(self, params: Mapping[str, jax.Array]) -> LanguageModel:
        """The model with these parameters; call it inside a traced function.

        Args:
          params: dotted path -> array, as `shapes`.
        """
        flat = [(path, leaf.replace(params[name])) for name, (path, leaf) in self._leaves.items()]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))


def scale_path(weight_path: str) -> str:
    """Where the scales of a quantised weight stand."""
    return weight_path.removesuffix(".weight") + ".scale"


def _quantize(module: nnx.Module, quantization: Quantization) -> None:
    """Replaces every `Linear` below a module."""
    for name, child in list(vars(module).items()):
        if isinstance(child, Linear):
            setattr(module, name, QuantizedLinear(child, quantization))
        elif isinstance(child, nnx.List):
            for item in filter(None, child):
                _quantize(item, quantization)
        elif isinstance(child, nnx.Module):
            _quantize(child, quantization)
