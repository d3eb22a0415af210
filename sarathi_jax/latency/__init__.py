"""How long a step takes: measured times of the programs, how far the device has drifted from them, what follows."""

from sarathi_jax.latency.forecast import Backlog, time_to_first_token_s
from sarathi_jax.latency.table import LatencyTable, TableError, Timing, chunk_keys
from sarathi_jax.latency.times import StepTimes

__all__ = ["Backlog", "LatencyTable", "StepTimes", "TableError", "Timing", "chunk_keys", "time_to_first_token_s"]
