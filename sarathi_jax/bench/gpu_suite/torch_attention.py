"""Times torch's scaled_dot_product_attention; run by `peers` as a script, imports nothing of this project.

Reads a JSON list of {"key", "sequences", "length", "kv_len", "heads", "kv_heads", "head_dim"} and prints one JSON line
each: what is timed is a dense batch in bfloat16, a causal prompt where length equals kv_len, else without a mask.
"""

# pyright: reportMissingImports=false
# torch is no dependency: another interpreter may run this file.

import json
import statistics
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention


def time_case(case: dict, copies: int = 4, calls: int = 8, rounds: int = 10) -> dict:
    """Median time of a call by device events, over several sets of keys and values in turn."""

    def draw(heads: int, length: int) -> torch.Tensor:
        size = (case["sequences"], heads, length, case["head_dim"])
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    q = draw(case["heads"], case["length"])
    pairs = [(draw(case["kv_heads"], case["kv_len"]), draw(case["kv_heads"], case["kv_len"])) for _ in range(copies)]
    options = {"is_causal": case["length"] == case["kv_len"] > 1, "enable_gqa": case["heads"] != case["kv_heads"]}

    def chain() -> None:
        for i in range(calls):
            scaled_dot_product_attention(q, *pairs[i % copies], **options)

    for _ in range(3):
        chain()
    # A graph, so that what is timed is the device and not Python.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    median = statistics.median(times)
    return {"time_us": median, "spread": round((max(times) - min(times)) / median, 4)}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    for case in json.load(sys.stdin):
        try:
            row = time_case(case)
        except RuntimeError as error:
            row = {"reason": str(error)[:400]}
        torch.cuda.empty_cache()
        print(json.dumps({"key": case["key"], **row}), flush=True)


if __name__ == "__main__":
    main()
