"""Where a model's parts are when it is served by several devices."""

from sarathi_jax.parallel.tensor import AXIS, TensorSplit, make_mesh

__all__ = ["AXIS", "TensorSplit", "make_mesh"]
