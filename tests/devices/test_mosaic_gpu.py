"""The Hopper kernel, compiled with the real WGMMA for the ways it may be cut: instructions, registers, memory."""

import dataclasses
import functools

import jax
import pytest

from pallas_kernels.ragged_paged_attention import mosaic_gpu
from pallas_kernels.ragged_paged_attention.cases import CASES, Size, build, groups
from tests.devices.compiling import Ptx, compile_lowered, device_of, everywhere
from tests.devices.test_kernels import Config, bytes_of, call_of

# A thread reads these once a piece: three columns as producer, six as consumer.
PIECE_LOADS = 9
# Windows and groups of heads that test_kernels.py does not have: a window needs the most registers.
CONFIGS = [
    Config(block_size=16, window=4096),
    Config(block_size=64, window=4096, heads=64),
    Config(block_size=128, window=4096, heads=128, kv_heads=1),
    Config(block_size=32, heads=32, kv_heads=32),
    Config(head_dim=64, block_size=16, window=100, heads=71, kv_heads=1),
    Config(head_dim=64, block_size=128, window=4096, heads=232),
]


def lower(config: Config, **options) -> jax.stages.Lowered:
    sharding = everywhere("H200")
    shapes = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), s) for s in config.shapes()
    ]
    call = call_of("mosaic_gpu", config)
    if options:
        call = functools.partial(mosaic_gpu.ragged_paged_attention, scale=1.0, window=config.window, **options)
    with device_of("mosaic_gpu"):
        return jax.jit(call, donate_argnums=3).lower(*shapes)


def check_attention(kernel: Ptx, config: Config, step_keys: int) -> None:
    copies = max(1, step_keys // config.block_size)
    assert kernel.spilled_bytes == 0
    # K and V by TMA alone: one look-up and two copies a block; queries in, two kinds of results out.
    assert len(kernel.scalar_loads) <= copies + PIECE_LOADS
    assert kernel.wide_copies == 2 * copies + 3
    # WGMMA takes 16 columns of Q at a time, and 16 keys of P.
    assert kernel.products == config.head_dim // 16 + step_keys // 16


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configuration(config):
    compiled = compile_lowered(lower(config), "cuda")
    assert compiled.executable.memory_analysis().alias_size_in_bytes >= bytes_of(config.shapes())
    # Mosaic compiles equal modules of a process once: `write_kv` may have been seen in an earlier test.
    kernels = {kernel.name.removesuffix("_mosaic_gpu_kernel"): kernel for kernel in compiled.kernels}
    assert all(kernel.spilled_bytes == 0 for kernel in kernels.values())
    check_attention(kernels["ragged_paged_attention"], config, mosaic_gpu.Tuning().step_keys)


@pytest.mark.parametrize("group", groups())
def test_interpreted_cases(group):
    """What is interpreted with a substitute for WGMMA compiles with the real one: a program serves a group of cases."""
    cases = [CASES[name] for name in groups()[group]]
    size, sharding = functools.reduce(Size.__or__, (case.size for case in cases)), everywhere("H200")
    batch = build(cases[0], size=size)
    shapes = [
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16" if x.ndim == 4 else x.dtype, sharding=sharding),
            getattr(batch, field.name),
        )
        for field in dataclasses.fields(batch)
    ]
    options = {"scale": cases[0].head_dim ** -0.5, "window": cases[0].window}
    with device_of("mosaic_gpu"):
        lowered = jax.jit(functools.partial(mosaic_gpu.ragged_paged_attention, **options), donate_argnums=3).lower(
            *shapes
        )
    compiled = compile_lowered(lowered, "cuda")
    assert all(kernel.spilled_bytes == 0 for kernel in compiled.kernels)
    cache_bytes = sum(2 * cache.size for cache in shapes[3])
    assert compiled.executable.memory_analysis().alias_size_in_bytes >= cache_bytes


@pytest.mark.parametrize(
    "tuning",
    [mosaic_gpu.Tuning(take_turns=False), mosaic_gpu.Tuning(step_keys=64, stages=4)],
    ids=["no turns", "short steps"],
)
def test_tuning(tuning):
    config = Config(window=4096)
    *_, kernel = compile_lowered(lower(config, tuning=tuning), "cuda").kernels
    check_attention(kernel, config, tuning.step_keys)


def test_too_many_stages_are_refused():
    with pytest.raises(ValueError, match="exceeds available shared memory: .* max_smem_bytes=232448"):
        lower(Config(), tuning=mosaic_gpu.Tuning(stages=3)).compile()
