"""The scheduler that an `EngineConfig` asks for: the server and the simulator both make theirs here."""

from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.latency import StepTimes
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.plan import KeepPace
from sarathi_jax.scheduling.sarathi import SarathiScheduler
from sarathi_jax.scheduling.vllm import VllmScheduler


def make_scheduler(
    model: ModelConfig, engine: EngineConfig, cache: CacheConfig, times: StepTimes | None = None
) -> Scheduler:
    """A scheduler with a fresh pool of blocks.

    Args:
      model: whose window decides which blocks are freed early.
      engine: the policy and its settings.
      cache: the pool's size.
      times: of the steps, to keep the times that requests are promised (anything with the methods of `StepTimes`
        serves); None: none are promised.
    """
    sizes: Sizes = {
        "block_size": cache.block_size,
        "buckets": engine.buckets,
        "max_num_seqs": engine.max_num_seqs,
        "window": model.cache_window,
        "max_model_len": cache.max_model_len,
        "num_stages": engine.pp,
        "prefix_caching": engine.prefix_caching,
    }
    pool = BlockPool(cache.num_blocks)
    if engine.policy == "vllm":
        return VllmScheduler(pool, **sizes)
    chooser = None if times is None else KeepPace(times, engine.buckets, engine.pp)
    return SarathiScheduler(pool, chooser=chooser, **sizes)
