"""What the live page shows: the latest steps, and percentiles of the latest times."""

import collections
import threading
from collections.abc import Iterable
from typing import Any

from sarathi_jax.request import RequestOutput
from sarathi_jax.telemetry.definitions import quantile
from sarathi_jax.telemetry.steps import StepRecord

NUM_STEPS = 240
WINDOW_S = 60.0


class LiveView:
    """An observer of all engines that keeps the latest of what they did.

    Args:
      tbt_slo_ms, ttft_slo_ms: what is promised; None: nothing.
    """

    def __init__(self, tbt_slo_ms: float | None = None, ttft_slo_ms: float | None = None):
        self._slos = {"tbt_slo_ms": tbt_slo_ms, "ttft_slo_ms": ttft_slo_ms}
        self._lock = threading.Lock()
        self._steps: collections.deque[dict[str, Any]] = collections.deque(maxlen=NUM_STEPS)
        self._ttfts: collections.deque[tuple[float, float]] = collections.deque()
        self._tbts: collections.deque[tuple[float, float]] = collections.deque()
        self._num_steps = 0
        self._totals = collections.Counter[str]()
        self._state: dict[str, Any] = {}

    def on_step(self, record: StepRecord) -> None:
        plan, state = record.plan, record.state
        step = {
            "index": self._num_steps,
            "bucket": plan.bucket,
            "decodes": plan.num_decodes,
            "prefill": plan.num_tokens - plan.num_decodes,
            "ms": round(record.duration_s * 1e3, 3),
        }
        with self._lock:
            self._num_steps += 1
            self._steps.append(step)
            self._ttfts += [(record.ended_s, seconds) for seconds in record.ttfts_s]
            self._tbts += [(record.ended_s, seconds) for seconds in record.tbts_s]
            for times in (self._ttfts, self._tbts):
                while times and times[0][0] < record.ended_s - WINDOW_S:
                    times.popleft()
            self._totals["output_tokens"] += record.num_drawn
            self._totals["prefill_tokens"] += plan.num_tokens - plan.num_decodes
            self._totals["preemptions"] += len(plan.preempted)
            self._state = {
                "running": state.num_running,
                "waiting": state.num_waiting,
                "blocks": state.num_blocks,
                "free_blocks": state.num_free_blocks,
                "prefix_queries": state.num_prefix_queries,
                "prefix_hits": state.num_prefix_hits,
            }

    def on_end(self, output: RequestOutput) -> None:
        with self._lock:
            self._totals["requests"] += 1

    def snapshot(self, since: int = 0) -> dict[str, Any]:
        """Everything for the page, ready for JSON.

        Args:
          since: steps before this index are left out.
        """
        with self._lock:
            return {
                **self._slos,
                **self._state,
                "totals": dict(self._totals),
                "num_steps": self._num_steps,
                "steps": [step for step in self._steps if step["index"] >= since],
                "ttft_ms": _percentiles(seconds for _, seconds in self._ttfts),
                "tbt_ms": _percentiles(seconds for _, seconds in self._tbts),
            }


def _percentiles(seconds: Iterable[float]) -> dict[str, float | int]:
    """Count, and P50, P90, P99 in milliseconds (nearest rank)."""
    values = list(seconds)
    ranks = {f"p{p}": quantile(values, p / 100) for p in (50, 90, 99) if values}
    return {"count": len(values)} | {name: round(value * 1e3, 3) for name, value in ranks.items()}
