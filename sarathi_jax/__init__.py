"""Sarathi-Serve in JAX: chunked prefills, stall-free batching and a token budget on a paged KV cache.

`LLM` and `Score` load jax when first used, so that configuration and requests can be handled without it.
"""

from typing import TYPE_CHECKING, Any

from sarathi_jax.config import ConfigError, EngineConfig, ModelConfig
from sarathi_jax.request import Logprob, RequestError, RequestOutput, SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from sarathi_jax.llm import LLM, Score

__all__ = [
    "LLM",
    "ConfigError",
    "EngineConfig",
    "Logprob",
    "ModelConfig",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Score"):
        from sarathi_jax import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'sarathi_jax' has no attribute {name!r}")
