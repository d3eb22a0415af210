"""Every kernel and case, and whole model steps, lowered for the platform they are for, by JAX alone.

Finds block shapes, types and primitives that a backend does not take. What only its compiler finds is in tests/devices.
"""

import contextlib
import functools
import re

import jax
import pytest

from pallas_kernels.ragged_paged_attention import BACKENDS, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.cases import CASES
from sarathi_jax.config import CacheConfig, EngineConfig
from sarathi_jax.step_program import StepProgram
from sarathi_jax.weights.directory import load_model_yaml
from tests.kernels.abstract import on_h200, shapes_of

DEVICE_BACKENDS = [name for name, backend in BACKENDS.items() if backend.platform is not None]
# How each backend's kernels are called in a lowered module.
TARGETS = {"triton": "__gpu$xla.gpu.triton", "mosaic_gpu": "mosaic_gpu_v2", "mosaic_tpu": "tpu_custom_call"}
MODELS = ("mistral-7b", "falcon-180b")


def lower(backend: str, traced: jax.stages.Traced) -> str:
    return traced.lower(lowering_platforms=(BACKENDS[backend].platform,)).as_text()


def device_of(backend: str):
    return on_h200() if BACKENDS[backend].platform == "cuda" else contextlib.nullcontext()


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("backend", "dtype"), [(name, dtype) for name in DEVICE_BACKENDS for dtype in BACKENDS[name].dtypes or ()]
)
def test_kernel(backend, dtype):
    for name, case in CASES.items():
        call = functools.partial(ragged_paged_attention, scale=0.125, window=case.window, backend=backend)
        with device_of(backend):
            text = lower(backend, jax.jit(call, donate_argnums=3).trace(*shapes_of(case, dtype)))
        assert TARGETS[backend] in text, name
        # Keys and values, each written where they stand.
        assert len(re.findall(r"#stablehlo.output_operand_alias<", text)) == 2, name


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", DEVICE_BACKENDS)
def test_model_step(repo, backend, name):
    model = load_model_yaml(repo / "configs" / "models" / f"{name}.yaml")
    engine = EngineConfig(token_budget=512, token_buckets=(512,), attention_backend=backend)
    program = StepProgram(model, engine, CacheConfig(num_blocks=1024, block_size=32, max_model_len=2048))
    with device_of(backend):
        text = lower(backend, program.trace(512))
    assert TARGETS[backend] in text
