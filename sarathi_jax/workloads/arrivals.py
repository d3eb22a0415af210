"""When requests arrive: seconds from the start, ascending.

Every kind ends with ``(number, seed)``, so that ``functools.partial`` makes of it what a `Workload` takes. Of two runs
with one seed and different rates the gaps differ by a factor alone.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence

from sarathi_jax.workloads.lengths import WorkloadError, check_above_zero

ArrivalSource = Callable[[int, int], list[float]]
"""Number and seed to seconds; the same seed gives the same ones."""


def static(number: int, seed: int = 0) -> list[float]:
    """All at once; the seed changes nothing."""
    del seed
    return [0.0] * number


def poisson(rate: float, number: int, seed: int) -> list[float]:
    """Arrivals that know nothing of each other. The paper's harness cuts gaps at three times their mean; this does not.

    Args:
      rate: requests a second, above 0.
      number: of requests.
      seed: the same one gives the same times.

    Returns:
      Seconds from the start, ascending.

    Raises:
      WorkloadError: another rate.
    """
    check_above_zero("rate", rate)
    generator = random.Random(seed)
    return list(itertools.accumulate(generator.expovariate(rate) for _ in range(number)))


def gamma(rate: float, variation: float, number: int, seed: int) -> list[float]:
    """Gaps drawn from a gamma distribution.

    Args:
      rate: requests a second on average, above 0.
      variation: standard deviation of the gaps over their mean; 1 is Poisson, more is burstier, less more regular.
      number: of requests.
      seed: the same one gives the same times.

    Raises:
      WorkloadError: a rate or variation that is not above 0.
    """
    check_above_zero("rate", rate)
    check_above_zero("variation", variation)
    generator, shape = random.Random(seed), variation**-2
    return list(itertools.accumulate(generator.gammavariate(shape, 1 / (rate * shape)) for _ in range(number)))


def bursts(rate: float, on_s: float, off_s: float, number: int, seed: int) -> list[float]:
    """Poisson arrivals for `on_s` seconds, none for `off_s`, again and again.

    Args:
      rate: requests a second on average over both; it is higher while they come.
      on_s: above 0.
      off_s: 0 or more.
      number: of requests.
      seed: the same one gives the same times.

    Raises:
      WorkloadError: numbers other than these.
    """
    check_above_zero("rate", rate)
    check_above_zero("on_s", on_s)
    if not 0 <= off_s < math.inf:
        raise WorkloadError(f"off_s must be 0 or more seconds, not {off_s}")
    return [at_s + off_s * (at_s // on_s) for at_s in poisson(rate * (on_s + off_s) / on_s, number, seed)]


def recorded(arrivals_s: Sequence[float] | None, time_scale: float, number: int, seed: int = 0) -> list[float]:
    """The first times of a record; take its lengths `in_order` with them. The seed changes nothing.

    Args:
      arrivals_s: of `Trace`.
      time_scale: every time is multiplied by it: 0.5 is twice the load.
      number: of requests.

    Raises:
      WorkloadError: there are no times, or fewer; a scale that is not above 0.
    """
    del seed
    check_above_zero("time_scale", time_scale)
    if arrivals_s is None:
        raise WorkloadError("recorded arrivals need a trace file with the column arrived_at; or choose a rate")
    if number > len(arrivals_s):
        raise WorkloadError(f"{number} requests are asked for, but the times of {len(arrivals_s)} are recorded")
    return [time_scale * at_s for at_s in arrivals_s[:number]]
