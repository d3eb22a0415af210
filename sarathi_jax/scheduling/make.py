"""The scheduler that an `EngineConfig` asks for: the server and the simulator both make theirs here."""

from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig, Policy
from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.latency import StepTimes
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.chunked_only import ChunkedOnlyScheduler
from sarathi_jax.scheduling.faster_transformer import FasterTransformerScheduler
from sarathi_jax.scheduling.fastserve import FastServeScheduler
from sarathi_jax.scheduling.orca import OrcaScheduler
from sarathi_jax.scheduling.plan import Chooser, ChunkSchedule, KeepPace
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
      times: of the steps (anything with the methods of `StepTimes` serves), to keep what requests are promised, and as
        the unit of work of ``fastserve``; None: nothing is promised, and work is counted in tokens.
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
    chooser = None if times is None else KeepPace(times, engine.buckets, engine.pp)
    chunks = None if engine.chunk_schedule is None else ChunkSchedule(*engine.chunk_schedule)
    return scheduler_of(engine.policy, BlockPool(cache.num_blocks), sizes, chooser, chunks, times)


def scheduler_of(
    policy: Policy,
    pool: BlockPool,
    sizes: Sizes,
    chooser: Chooser | None = None,
    chunk_schedule: ChunkSchedule | None = None,
    times: StepTimes | None = None,
) -> Scheduler:
    """A scheduler around any pool.

    Args:
      policy: as in `EngineConfig`.
      pool, sizes: as in `Scheduler`.
      chooser, chunk_schedule: as in `ChunkingScheduler`; other policies have no use for them.
      times: as in `FastServeScheduler`; others have no use for them.
    """
    match policy:
        case "sarathi":
            return SarathiScheduler(pool, chooser=chooser, chunk_schedule=chunk_schedule, **sizes)
        case "chunked_only":
            return ChunkedOnlyScheduler(pool, chooser=chooser, chunk_schedule=chunk_schedule, **sizes)
        case "hybrid_only":
            return SarathiScheduler(pool, cuts_prompts=False, **sizes)
        case "vllm":
            return VllmScheduler(pool, **sizes)
        case "orca":
            return OrcaScheduler(pool, **sizes)
        case "faster_transformer":
            return FasterTransformerScheduler(pool, **sizes)
        case "fastserve":
            return FastServeScheduler(pool, times=times, **sizes)
