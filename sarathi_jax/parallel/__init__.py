"""Where a model's parts are when it is served by several devices."""

from sarathi_jax.parallel.pipeline import Stage, check_split, make_meshes, split_layers
from sarathi_jax.parallel.tensor import AXIS, TensorSplit

__all__ = ["AXIS", "Stage", "TensorSplit", "check_split", "make_meshes", "split_layers"]
