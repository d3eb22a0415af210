"""The table of step times that an engine would measure at its start, had it the devices."""

from sarathi_jax.config import CacheConfig, EngineConfig
from sarathi_jax.latency import LatencyTable, Roofline, Timing, Work, chunk_keys

_FILLS = (0.0, 1 / 3, 2 / 3, 1.0)  # of the cache, as `sarathi_jax.timing` measures them


def tabulate(roofline: Roofline, engine: EngineConfig, cache: CacheConfig) -> LatencyTable:
    """Times every bucket with one decode, full of decodes, and full of one prompt, at some fills of the cache.

    Args:
      roofline: of the devices.
      engine: whose buckets.
      cache: how far it can be filled.
    """
    timings = set[Timing]()
    longest = min(cache.max_model_len - 1, cache.num_blocks * cache.block_size)
    for bucket in engine.buckets:
        length = min(bucket, longest)
        for fill in _FILLS:
            for num in {1, min(bucket, engine.max_running, cache.num_blocks)}:
                room = min(cache.max_model_len - 1, cache.num_blocks // num * cache.block_size)
                keys = num * max(1, round(fill * room))
                timings.add(Timing(bucket, num, keys, 0, roofline.work_s(Work(bucket, num, keys, 0, num))))
            keys = chunk_keys(round(fill * (longest - length)), length)
            timings.add(Timing(bucket, 0, 0, keys, roofline.work_s(Work(bucket, 0, 0, keys, 1))))
    return LatencyTable(timings, {"device": roofline.device.name, "tp": roofline.tp, "pp": roofline.pp})
