"""Attention kernels, compiled for each device that they are for."""

import dataclasses
import functools
import re

import jax
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.ragged_paged_attention import BACKENDS, ragged_paged_attention
from sarathi_jax.kv.cache import row_major
from sarathi_jax.parallel import AXIS
from tests.devices.compiling import compile_lowered, device_of, everywhere

# Look-ups in the block table that a thread makes a step, for keys of its own; the Hopper kernel reads the nine numbers
# of its next piece of work besides.
MAX_TABLE_LOADS = 24


@dataclasses.dataclass(frozen=True)
class Config:
    """A bucket of a server: shapes as large as they get in service."""

    head_dim: int = 128
    block_size: int = 32
    dtype: str = "bfloat16"
    heads: int = 32
    kv_heads: int = 8
    window: int | None = None
    num_tokens: int = 512
    num_sequences: int = 64

    def __str__(self) -> str:
        parts = [
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}",
            f"blocks of {self.block_size}",
            self.dtype,
            f"{self.num_tokens} tokens of {self.num_sequences} sequences",
        ]
        return ", ".join(parts if self.window is None else [*parts, f"window {self.window}"])

    def shapes(self) -> list:
        """As the model gives them: activations float32."""
        T, S, H, G, D = self.num_tokens, self.num_sequences, self.heads, self.kv_heads, self.head_dim
        num_blocks, max_blocks = 65536 // self.block_size, 4096 // self.block_size
        cache = jax.ShapeDtypeStruct((num_blocks, G, self.block_size, D), self.dtype)
        activations = [jax.ShapeDtypeStruct((T, n, D), "float32") for n in (H, G, G)]
        integers = [jax.ShapeDtypeStruct(s, "int32") for s in ((T,), (S + 1,), (S,), (S, max_blocks), (), ())]
        return [*activations, (cache, cache), *integers]


BLOCKS = [Config(head_dim=d, block_size=k) for d in (64, 128) for k in (16, 32, 64, 128)]
FLOAT32 = [Config(dtype="float32"), Config(head_dim=64, block_size=64, dtype="float32")]
MODELS = [
    Config(window=4096),
    Config(num_tokens=32, num_sequences=32),
    Config(num_tokens=1, num_sequences=1),
    Config(num_tokens=2048, num_sequences=128),
    Config(heads=56, kv_heads=8),
    Config(heads=71, kv_heads=1, head_dim=64),
    Config(heads=232, kv_heads=8, head_dim=64),
    Config(heads=32, kv_heads=32),
]
CONFIGS = {
    ("triton", "H200"): [*BLOCKS, *FLOAT32, *MODELS],
    ("mosaic_gpu", "H200"): [*BLOCKS, *MODELS[:3], *MODELS[5:7]],  # a quarter of a minute each
    ("mosaic_tpu", "TPU v5e"): [*BLOCKS, *FLOAT32, *MODELS],
    ("mosaic_tpu", "TPU v6e"): [Config(), Config(head_dim=64, block_size=16), FLOAT32[0]],
}


def call_of(backend: str, config: Config):
    return functools.partial(ragged_paged_attention, scale=config.head_dim**-0.5, window=config.window, backend=backend)


def bytes_of(shapes: list) -> int:
    return sum(cache.size * cache.dtype.itemsize for cache in shapes[3])


@pytest.mark.parametrize(
    ("backend", "target", "config"),
    [(backend, target, config) for (backend, target), configs in CONFIGS.items() for config in configs],
    ids=str,
)
def test_kernel(backend, target, config, tables):
    platform, replicated = BACKENDS[backend].platform, everywhere(target)
    cache = row_major(replicated)
    shapes = config.shapes()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cache if x.ndim == 4 else replicated), shapes
    )
    call = jax.jit(call_of(backend, config), donate_argnums=3, out_shardings=(replicated, (cache, cache)))
    with device_of(backend):
        lowered = call.lower(*shapes)
    compiled = compile_lowered(lowered, platform)
    memory = compiled.executable.memory_analysis()
    shape = re.escape(",".join(map(str, shapes[3][0].shape)))
    moved = re.findall(rf"= \S*\[{shape}\]\S* copy(?:-start)?\(.*", compiled.executable.as_text())
    assert not moved, moved
    assert memory.alias_size_in_bytes >= bytes_of(shapes)
    if platform == "tpu":
        code, scratch = memory.generated_code_size_in_bytes / 2**10, memory.temp_size_in_bytes / 2**20
        tables["TPU kernels"].append(f"| {backend} | {target} | {config} | {code:.0f} | {scratch:.1f} |")
        return
    assert compiled.kernels
    for kernel in compiled.kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert len(kernel.scalar_loads) <= MAX_TABLE_LOADS, kernel
        assert not [load for load in kernel.scalar_loads if "16" in load or "8" in load], kernel
        numbers = (
            kernel.registers,
            kernel.spilled_bytes,
            len(kernel.scalar_loads),
            kernel.wide_copies,
            kernel.products,
        )
        cells = " | ".join(map(str, (f"{backend} `{kernel.name}`", target, config, *numbers)))
        tables["GPU kernels"].append(f"| {cells} |")


@pytest.mark.parametrize("backend", ["triton", "mosaic_gpu"])
def test_heads_over_eight_gpus(backend):
    """Each GPU has one KV head and its queries; nothing needs to be sent."""
    config = Config()
    replicated = everywhere("8 x H200")
    heads, cache = PartitionSpec(None, AXIS), (PartitionSpec(None, AXIS),) * 2
    specs = (heads, heads, heads, cache, *(PartitionSpec(),) * 6)
    call = jax.shard_map(
        call_of(backend, config), mesh=replicated.mesh, in_specs=specs, out_specs=(heads, cache), check_vma=False
    )
    shapes = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.NamedSharding(replicated.mesh, spec)
        ),
        config.shapes(),
        list(specs),
    )
    with device_of(backend):
        lowered = jax.jit(call, donate_argnums=3).lower(*shapes)
    compiled = compile_lowered(lowered, "cuda")
    text = compiled.executable.as_text()
    sent = [word for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all") if word in text]
    assert not sent
    assert compiled.executable.memory_analysis().alias_size_in_bytes >= bytes_of(shapes) // 8
