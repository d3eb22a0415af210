"""Kernels without arrays and without devices: shapes of a case, and an H200 that the Triton lowering can ask about."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.cases import Case, build


def shapes_of(case: Case, dtype: str) -> list:
    """The arguments of a case as the model gives them: activations float32, the cache in `dtype`."""
    batch = build(case)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    fields["kv_cache"] = tuple(cache.astype(jnp.dtype(dtype)) for cache in batch.kv_cache)
    return [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), field) for field in fields.values()]


def on_h200():
    """A context in which the default GPU is an H200."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
