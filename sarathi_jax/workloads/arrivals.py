"""When requests arrive."""

import itertools
import random


def poisson(rate: float, number: int, seed: int) -> list[float]:
    """Arrivals that know nothing of each other. The paper's harness cuts gaps at three times their mean; this does not.

    Args:
      rate: requests a second, above 0.
      number: of requests.
      seed: the same one gives the same times.

    Returns:
      Seconds from the start, ascending.
    """
    generator = random.Random(seed)
    return list(itertools.accumulate(generator.expovariate(rate) for _ in range(number)))
