"""A workload: how many requests, how long each is, and when it arrives."""

import dataclasses
import random

from sarathi_jax.workloads.arrivals import ArrivalSource
from sarathi_jax.workloads.lengths import WorkloadError, scaled
from sarathi_jax.workloads.traces import LengthSource


@dataclasses.dataclass(frozen=True)
class TimedRequest:
    """A request to be sent.

    Attributes:
      arrival_s: seconds from the start.
      prompt, output: tokens, both at least 1.
      group: whose prompts begin alike; None: this one begins like no other.
      shared: tokens of the prompt's beginning that the whole group has.
    """

    arrival_s: float
    prompt: int
    output: int
    group: int | None = None
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class Workload:
    """What arrives, whoever serves it: ``Workload(partial(synthesise, CHAT), partial(poisson, 2.5), 1000, seed=0)``.

    Attributes:
      lengths: number and seed to lengths.
      arrivals: number and seed to seconds.
      number: of requests, at least 1.
      seed: the same one gives the same requests. Neither of lengths and arrivals changes with the other.
      context: of the model, to which lengths are scaled; None: they are left as they are.
      longest: prompt and output together before scaling; needed with a context.
      groups: each request is in one of so many, drawn at random; None: in none.
      shared_tokens: the prompts of a group begin with so many equal tokens, as far as they reach; needed with groups.
    """

    lengths: LengthSource
    arrivals: ArrivalSource
    number: int
    seed: int = 0
    context: int | None = None
    longest: int | None = None
    groups: int | None = None
    shared_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.number < 1:
            raise WorkloadError(f"a workload has at least 1 request, not {self.number}")
        if (self.context is None) != (self.longest is None):
            raise WorkloadError("context and longest go together: lengths of at most `longest` are scaled to `context`")
        check_groups(self.groups, self.shared_tokens)

    def requests(self) -> list[TimedRequest]:
        """The requests in the order of their arrival.

        Raises:
          WorkloadError: lengths or arrivals cannot be had.
        """
        lengths = self.lengths(self.number, _seed_of("lengths", self.seed))
        if self.context is not None and self.longest is not None:
            lengths = scaled(lengths, self.longest, self.context)
        arrivals_s = self.arrivals(self.number, _seed_of("arrivals", self.seed))
        requests = [
            TimedRequest(at_s, length.prompt, length.output) for at_s, length in zip(arrivals_s, lengths, strict=True)
        ]
        if self.groups is None or self.shared_tokens is None:
            return requests
        generator = random.Random(_seed_of("groups", self.seed))
        return [
            dataclasses.replace(
                request, group=generator.randrange(self.groups), shared=min(self.shared_tokens, request.prompt)
            )
            for request in requests
        ]


def check_groups(groups: int | None, shared_tokens: int | None) -> None:
    """Raises a WorkloadError unless both are given and at least 1, or neither is."""
    if (groups is None) != (shared_tokens is None):
        raise WorkloadError("groups and shared_tokens go together: how many groups, and how their prompts begin alike")
    for name, value in (("groups", groups), ("shared_tokens", shared_tokens)):
        if value is not None and value < 1:
            raise WorkloadError(f"{name} must be at least 1, not {value}")


def _seed_of(what: str, seed: int) -> int:
    """Of one seed two that have nothing in common, so that long requests do not come at long gaps."""
    return random.Random(f"{what} {seed}").getrandbits(64)
