"""Many simulations at once, in processes of their own."""

import concurrent.futures
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

from sarathi_jax.bench.paper.experiment import Options


def in_parallel[Item, Answer](
    function: Callable[[Item], Answer], items: Sequence[Item], options: Options, what: str
) -> list[Answer]:
    """Answers in the order of the items, with a bar of progress on standard error.

    Args:
      function: of a module, and items and answers that can be pickled; it must not depend on anything else.
      items: to be answered.
      options: how many processes.
      what: is done, for the bar.
    """

    def counted(answers: Iterable[Answer]) -> list[Answer]:
        return list(tqdm(answers, what, len(items), leave=False, file=sys.stderr))

    if options.processes == 1 or len(items) == 1:
        return counted(map(function, items))
    # Fresh interpreters: JAX has threads, which a fork would leave behind.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(options.processes, len(items)), context) as pool:
        return counted(pool.map(function, items))
