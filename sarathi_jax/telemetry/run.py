"""`Run`: what came of a workload, whoever served it: a simulator, an engine in this process, a server."""

import dataclasses

from sarathi_jax.telemetry.definitions import (
    Observations,
    SampleTimes,
    Throughput,
    keeps_promise,
    scheduling_delays,
    tbts,
    throughput,
    ttfts,
)
from sarathi_jax.telemetry.steps import StepRecord


@dataclasses.dataclass(frozen=True)
class Run:
    """A workload that was served, in seconds since its start.

    Attributes:
      samples: of all requests that arrived, in the order of their arrival.
      end_s: when the last one ended, or when the run was cut off.
      steps: of each replica in turn; empty where they are not known (a server that is not ours).
    """

    samples: tuple[SampleTimes, ...]
    end_s: float
    steps: tuple[tuple[StepRecord, ...], ...] = ()

    @property
    def ttfts(self) -> Observations:
        """Times to first token."""
        return ttfts(self.samples, self.end_s)

    @property
    def tbts(self) -> Observations:
        """Times between tokens."""
        return tbts(self.samples, self.end_s)

    @property
    def scheduling_delays(self) -> Observations:
        """Times from arrival to first scheduled."""
        return scheduling_delays(self.samples, self.end_s)

    @property
    def throughput(self) -> Throughput:
        """Of the whole run."""
        return throughput(self.samples, 0.0, self.end_s)

    def keeps_promise(self, tbt_slo_s: float) -> bool:
        """Whether the load is within the capacity, see `definitions.keeps_promise`."""
        return keeps_promise(self.samples, self.end_s, tbt_slo_s)
