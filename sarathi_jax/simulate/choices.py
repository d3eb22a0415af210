"""What a plan chooses between: what is asked for, what may be chosen, each choice with what is known of it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sarathi_jax.config import ConfigError
from sarathi_jax.latency import device_of
from sarathi_jax.workloads import TimedRequest

PRICES: Mapping[str, float] = {
    "a100-80gb": 1.80,
    "a40": 0.45,
    "h100": 3.00,
    "h200": 3.80,
    "tpu-v5e": 1.20,
    "cpu": 0.10,
}
"""Dollars an hour of one device: round examples, to be replaced by what yours cost."""


@dataclasses.dataclass(frozen=True)
class Demand:
    """What is asked for.

    Attributes:
      rate: requests a second in all.
      tbt_slo_s: P99 of the times between tokens.
      mean_tokens: of a request that must be computed.
      longest_tokens: of a request, prompt and output.
    """

    rate: float
    tbt_slo_s: float
    mean_tokens: float
    longest_tokens: int

    def __post_init__(self) -> None:
        for name in ("rate", "tbt_slo_s", "mean_tokens", "longest_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number above 0, not {getattr(self, name)}")

    @classmethod
    def of(cls, requests: Sequence[TimedRequest], rate: float, tbt_slo_s: float) -> "Demand":
        """The demand of a sample of requests."""
        tokens = [request.prompt + request.output for request in requests]
        # The last token drawn is not computed any more; what a group shares may be computed once.
        computed = [request.prompt - request.shared + request.output - 1 for request in requests]
        return cls(rate, tbt_slo_s, sum(computed) / max(1, len(computed)), max(tokens, default=0))


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be chosen.

    Attributes:
      devices: names of `DEVICES`, or files of `load_device`.
      prices: dollars an hour of one device, by name.
      tps, pps: devices of a stage, stages.
      budgets: tokens of a step; None: the server's own choice for each step, by the SLO.
      max_devices: of one replica.
      max_replicas: of a choice.
      dearest: times the cost of the cheapest choice found so far, beyond which nothing is simulated.
    """

    devices: tuple[str, ...]
    prices: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(PRICES))
    tps: tuple[int, ...] = (1, 2, 4, 8)
    pps: tuple[int, ...] = (1, 2)
    budgets: tuple[int | None, ...] = (512, 2048, None)
    max_devices: int = 16
    max_replicas: int = 64
    dearest: float = 2.0

    def __post_init__(self) -> None:
        for name in ("devices", "tps", "pps", "budgets"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: name at least one")
        for name in ("tps", "pps", "budgets"):
            if not all(value is None or value >= 1 for value in getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")
        for device in self.devices:
            device_of(device)
            if not 0 < self.prices.get(device, 0.0) < math.inf:
                raise ConfigError(f"what does {device} cost an hour? its price must be a number above 0")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to serve.

    Attributes:
      device, tp, pp: of a replica.
      budget: tokens of a step; None: chosen for each step by the SLO.
      replica_cost: dollars an hour of one replica.
      at_most: requests a second that no replica can exceed: every token's products at the best bucket.
      capacity: requests a second of a replica; 0: none, or not searched.
      below: at which it was found broken; the capacity lies between.
      replicas: that the rate needs; 0: not known.
      p99_tbt_s: at the load of one replica, or the next higher that was simulated; infinite: not known.
      is_close: the capacity was searched closely.
      reason: why it was rejected; "" where it was not.
    """

    device: str
    tp: int
    pp: int
    budget: int | None
    replica_cost: float
    at_most: float = 0.0
    capacity: float = 0.0
    below: float = 0.0
    replicas: int = 0
    p99_tbt_s: float = math.inf
    is_close: bool = False
    reason: str = ""

    @property
    def name(self) -> str:
        """In short."""
        budget = "budget by SLO" if self.budget is None else f"budget {self.budget}"
        return f"{self.device} tp={self.tp} pp={self.pp} {budget}"

    @property
    def cost(self) -> float:
        """Dollars an hour of all replicas; infinite where it is not known how many."""
        return self.replicas * self.replica_cost if self.replicas else math.inf

    @property
    def is_possible(self) -> bool:
        return not self.reason


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
      demand: what was asked for.
      choices: the possible ones by cost, then the rejected ones.
    """

    demand: Demand
    choices: tuple[Choice, ...]

    @property
    def best(self) -> Choice | None:
        """The cheapest; None: nothing serves this."""
        return next((choice for choice in self.choices if choice.is_possible), None)

    @property
    def front(self) -> tuple[Choice, ...]:
        """Possible choices that no other beats in cost and P99 TBT, by rising cost."""
        front: list[Choice] = []
        possible = [choice for choice in self.choices if choice.is_possible]
        for choice in sorted(possible, key=lambda choice: (choice.cost, choice.p99_tbt_s)):
            if not front or choice.p99_tbt_s < front[-1].p99_tbt_s:
                front.append(choice)
        return tuple(front)
