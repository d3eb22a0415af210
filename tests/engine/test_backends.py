"""The shipped checkpoint through every attention backend, interpreted: the same tokens as with `xla`."""

import functools

import pytest

from pallas_kernels.ragged_paged_attention import BACKENDS, ragged_paged_attention
from sarathi_jax import runner, step_program
from sarathi_jax.llm import LLM
from sarathi_jax.request import SamplingParams

PROMPTS = (
    "It is a truth universally acknowledged",
    "She was",
    "Mr. Darcy said nothing",
)
DEVICE_BACKENDS = [name for name, backend in BACKENDS.items() if backend.platform is not None]


def serve(backend: str, dtype: str) -> list[tuple[int, ...]]:
    """Three requests in steps of eight tokens: the prompts are chunked, and prefills share steps with decodes."""
    config = {"token_budget": 8, "token_buckets": (8,), "max_num_seqs": 3, "max_model_len": 48, "block_size": 16}
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with LLM(dtype=dtype, progress=False, num_blocks=12, attention_backend=backend, **config) as llm:
        outputs = llm.generate(list(PROMPTS), params, use_tqdm=False)
        assert max(len(output.prompt_token_ids) for output in outputs) > 8
        return [output.outputs[0].token_ids for output in outputs]


@functools.cache
def expected(dtype: str) -> list[tuple[int, ...]]:
    return serve("xla", dtype)


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("backend", DEVICE_BACKENDS)
def test_same_tokens_as_xla(backend, monkeypatch):
    dtype = (BACKENDS[backend].dtypes or ("float32",))[0]
    wanted = expected(dtype)
    monkeypatch.setattr(runner, "check_platform", lambda backend, platform: None)
    interpreted = functools.partial(ragged_paged_attention, interpret=True)
    monkeypatch.setattr(step_program, "ragged_paged_attention", interpreted)
    assert serve(backend, dtype) == wanted


def test_backend_of_another_platform_names_those_that_run_here():
    with pytest.raises(ValueError, match="'mosaic_tpu' needs tpu, this is cpu: choose xla"):
        LLM(progress=False, attention_backend="mosaic_tpu")
