"""How large a cache is wanted, and how large its blocks are; what memory allows is in `sarathi_jax.sizing`."""

from sarathi_jax.config import CacheConfig, ConfigError, Dtype, EngineConfig, ModelConfig

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


def block_bytes(model: ModelConfig, block_size: int, dtype: Dtype) -> int:
    """Bytes of one block over all layers."""
    return 2 * model.num_layers * model.num_kv_heads * block_size * model.head_dim * DTYPE_BYTES[dtype]


def wanted_cache(model: ModelConfig, engine: EngineConfig) -> CacheConfig:
    """`num_blocks` blocks, or without it as many as the sequences that may run at once can use.

    Raises:
      ConfigError: `max_model_len` exceeds the model's, or leaves no room.
    """
    max_model_len = model.max_position if engine.max_model_len is None else engine.max_model_len
    if max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len={max_model_len} exceeds the {model.max_position} positions the model was trained for: "
            "lower it, or give the model a rope scaling that extends them"
        )
    if max_model_len < 2:
        raise ConfigError(f"max_model_len={max_model_len} leaves no room for a prompt and an output token")
    per_seq = -(-max_model_len // engine.block_size)
    if model.cache_window is not None:
        # A windowed sequence frees what it passed: it holds its window, the largest chunk, and two cut blocks.
        span = model.cache_window + engine.buckets[-1]
        per_seq = min(per_seq, -(-span // engine.block_size) + 2)
    wanted = engine.max_running * per_seq if engine.num_blocks is None else engine.num_blocks
    return CacheConfig(wanted, engine.block_size, max_model_len)
