"""The loss curve as a picture; matplotlib is in the extra ``plots`` and imported only here."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw_curve(rows: Sequence[dict[str, float]], bytes_per_token: float, baseline: float, target: Path) -> bool:
    """Draws training and held-out bits per byte over tokens seen.

    Args:
      rows: what the run logged: ``loss`` in nats a token, ``tokens`` of the step, sometimes ``bits_per_byte``.
      bytes_per_token: of the training text, to show both curves in one unit.
      baseline: bits per byte of the n-gram model, drawn as a line.
      target: ``.svg`` or ``.png`` file.

    Returns:
      False where matplotlib is not installed; nothing is drawn then.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    seen = np.cumsum([row["tokens"] for row in rows]) / 1e6
    losses = np.array([row["loss"] for row in rows]) / math.log(2) / bytes_per_token
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = max(1, min(25, len(losses) // 4))
    smooth = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    axes.plot(seen[width - 1 :], smooth, label=f"training, mean of {width} steps", linewidth=1)
    held_out = [(x, row["bits_per_byte"]) for x, row in zip(seen, rows, strict=True) if "bits_per_byte" in row]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out, windows as long as the phase's", markersize=3)
    axes.axhline(baseline, color="grey", linestyle="--", label="Kneser-Ney trigram")
    axes.set(xlabel="million tokens seen", ylabel="bits per byte", ylim=(None, float(np.percentile(losses, 97))))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    return True
