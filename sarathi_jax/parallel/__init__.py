"""Where a model's parts are when it is served by several devices."""

from sarathi_jax.parallel.pipeline import make_meshes
from sarathi_jax.parallel.tensor import AXIS, put_parts
from sarathi_jax.partition import Stage, TensorSplit, check_split, split_layers

__all__ = ["AXIS", "Stage", "TensorSplit", "check_split", "make_meshes", "put_parts", "split_layers"]
