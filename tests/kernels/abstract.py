"""Kernels without arrays and without devices: shapes of a case, and GPUs that the Triton lowering can ask about."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.cases import Case, build
from sarathi_jax.parallel import AXIS


def shapes_of(case: Case, dtype: str) -> list:
    """The arguments of a case as the model gives them: activations float32, the cache in `dtype`."""
    batch = build(case)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    fields["kv_cache"] = tuple(cache.astype(jnp.dtype(dtype)) for cache in batch.kv_cache)
    return [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), field) for field in fields.values()]


def on_h200():
    """A context in which the default GPU is an H200."""
    return on_gpu("NVIDIA H200", 132)


def on_gpu(kind: str, num_cores: int, tp: int | None = None):
    """A context in which the default GPU is one of that kind and, with `tp`, so many of them are the mesh."""
    device = jax.sharding.AbstractDevice(device_kind=kind, platform="gpu", num_cores=num_cores)
    sizes, names = ((), ()) if tp is None else ((tp,), (AXIS,))
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(sizes, names, axis_types=types, abstract_device=device)
    )
