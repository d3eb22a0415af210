"""A picture of a kept and a broken promise: how long tokens keep a reader waiting, and one answer as it came."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

if TYPE_CHECKING:
    from sarathi_jax.bench.promise import Run

matplotlib.use("Agg")
from matplotlib import pyplot

_COLOURS = {"sarathi": "#4f81bd", "vllm": "#e39b3d"}
_NAMES = {"sarathi": "sarathi, with the promise", "vllm": "vllm: whole prompts first"}


def draw(runs: Sequence["Run"], slo_s: float, path: Path) -> None:
    """Draws one run of each policy.

    Args:
      runs: of the same arrivals.
      slo_s: what was promised.
      path: of the picture; its ending says which kind.
    """
    figure, (tail, answer) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for run in runs:
        gaps = sorted(1e3 * gap for gap in run.tbts_s)
        shares = [100 * (1 - i / len(gaps)) for i in range(len(gaps))]
        tail.step(gaps, shares, where="pre", color=_COLOURS[run.policy], label=_NAMES[run.policy], lw=2)
    tail.axvline(1e3 * slo_s, color="#b0433a", ls="--", lw=1.2)
    tail.text(1e3 * slo_s, 100, " promised", color="#b0433a", va="top")
    tail.axhline(1, color="#888", ls=":", lw=1)
    tail.set(xscale="log", yscale="log", xlabel="time between two tokens [ms]", ylabel="that took longer [%]")
    tail.text(tail.get_xlim()[0], 1.1, " P99", color="#666", va="bottom")
    tail.set_title("All times between tokens")
    tail.legend(loc="lower left", frameon=False)

    stalled = next(run for run in runs if run.policy == "vllm")
    index = max(range(len(stalled.answers)), key=lambda i: max(stalled.answers[i].tbts_s, default=0))
    for run in runs:
        came = run.answers[index]
        seconds = [at_s - came.token_s[0] for at_s in came.token_s]
        answer.step(seconds, range(1, len(seconds) + 1), where="post", color=_COLOURS[run.policy], lw=2)
    answer.set(xlabel="seconds since the answer's first token", ylabel="tokens received")
    answer.set_title("One answer: the one that stalled longest")
    for axes in (tail, answer):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
