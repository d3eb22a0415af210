"""Times products of matrices on this device, for ``main.py calibrate``: one CSV line ``m,k,n,ms`` each.

  python -m sarathi_jax.bench.products --out products.csv --sizes 1024x3072,1024x1024,4096x1024 --dtype bfloat16
  python main.py calibrate --products products.csv --device cpu --peak_tflops 0.32 --bandwidth_gb_s 20 --out mine.yaml

Each time is the median of several runs over copies of the weights in turn, so that hardly any of them is still in a
cache. Let nothing else run meanwhile.
"""

import csv
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from tqdm import tqdm

_OUT = flags.DEFINE_string("out", None, "CSV file to write", required=True)
_SIZES = flags.DEFINE_string("sizes", "1024x3072,1024x1024,4096x1024", "KxN of weights, with commas between")
_TOKENS = flags.DEFINE_list("tokens", "1,8,64,128,256,512,1024", "rows m")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("float32", "bfloat16"), "of both factors")
_REPEATS = flags.DEFINE_integer("repeats", 7, "runs of each product", lower_bound=1)

_WEIGHT_BYTES = 256 << 20  # all copies of a weight together: more than caches hold


def product_s(m: int, k: int, n: int, dtype: str, repeats: int) -> float:
    """Median seconds of a product [m, k] x [k, n].

    Args:
      m, k, n: its sizes.
      dtype: of both factors; sums are float32.
      repeats: runs, each over all copies of the weights.
    """
    # Many rows keep the device busy wherever the weights come from.
    copies = max(1, min(32, 4096 // m, _WEIGHT_BYTES // (k * n * jnp.dtype(dtype).itemsize)))
    x = jnp.ones((m, k), dtype)
    weights = [jnp.full((k, n), 0.5, dtype) for _ in range(copies)]
    multiply = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32))
    jax.block_until_ready(multiply(x, weights[0]))
    times_s = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        jax.block_until_ready([multiply(x, weight) for weight in weights])
        times_s.append((time.perf_counter() - begin_s) / copies)
    return statistics.median(times_s)


def measure(cases: Iterable[tuple[int, int, int]], dtype: str, repeats: int, path: Path) -> None:
    """Times products and writes a line each.

    Args:
      cases: (m, k, n).
      dtype, repeats: as of `product_s`.
      path: of the CSV file.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("m", "k", "n", "ms"))
        for m, k, n in tqdm(list(cases), "time", unit="product", disable=not sys.stderr.isatty()):
            table.writerow((m, k, n, f"{1e3 * product_s(m, k, n, dtype, repeats):.6g}"))


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    try:
        sizes = [(int(k), int(n)) for k, n in (size.split("x") for size in _SIZES.value.split(","))]
        tokens = [int(m) for m in _TOKENS.value]
    except ValueError:
        raise app.UsageError("--sizes are like 1024x3072,1024x1024 and --tokens like 1,64,512") from None
    if min([*tokens, *(side for size in sizes for side in size)]) < 1:
        raise app.UsageError("--sizes and --tokens must be above 0")
    measure([(m, k, n) for k, n in sizes for m in tokens], _DTYPE.value, _REPEATS.value, Path(_OUT.value))


if __name__ == "__main__":
    app.run(main)
