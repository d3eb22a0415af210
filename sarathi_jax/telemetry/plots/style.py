"""What all pictures share: a colour for each policy, plain axes, files that are the same for the same numbers."""

import collections
import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

COLOURS = {
    "sarathi": "#0072b2",
    "sarathi_slo": "#56b4e9",
    "vllm": "#e69f00",
    "orca": "#d55e00",
    "faster_transformer": "#7f7f7f",
    "chunked_only": "#009e73",
    "hybrid_only": "#cc79a7",
    "fastserve": "#8c564b",
}
"""Of each policy, told apart by those who see few colours too."""

SLO_COLOUR, NOTE_COLOUR = "#b2182b", "#666666"
_OTHERS = ("#332288", "#44aa99", "#999933", "#882255", "#117733", "#aa4499")
_DASHES = ("-", "--", ":", "-.")
_SETTINGS: dict[Any, Any] = {
    # Text stays text: small files, and names that can be searched for.
    "svg.fonttype": "none",
    "svg.hashsalt": "sarathi_jax",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "font.size": 10,
}


class PlotError(ValueError):
    """A picture that cannot be drawn; the message says what is missing."""


@contextlib.contextmanager
def picture(path: Path, size: tuple[float, float], **grid: Any) -> Iterator[Any]:
    """Axes to draw on, which are written to the file when the block ends.

    Args:
      path: ends with .svg or .png; its folder is made.
      size: width and height in inches.
      grid: as of matplotlib's ``Figure.subplots``.

    Raises:
      PlotError: another ending, or matplotlib is not installed.
    """
    if path.suffix not in (".svg", ".png"):
        raise PlotError(f"{path}: a picture is a file that ends with .svg or .png")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("pictures need matplotlib: pip install 'sarathi-jax[plots]'") from None
    with matplotlib.rc_context(_SETTINGS):
        # A figure of its own, not pyplot's: no window, and nothing shared between threads.
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.subplots(**grid)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each name: a policy's own colour also for a name that begins with it, "sarathi, 512"."""
    others, used = itertools.cycle(_OTHERS), collections.Counter[str]()
    styles = {}
    for name in names:
        word = re.match(r"\w*", name.lower())
        colour = COLOURS.get(word[0] if word else "") or next(others)
        styles[name] = {"color": colour, "linestyle": _DASHES[used[colour] % len(_DASHES)]}
        used[colour] += 1
    return styles


def plain_ticks(axis: Any) -> None:
    """Labels a logarithmic axis 0.5, 1, 2, 5, 10 in place of powers of ten."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def seconds_text(seconds: float) -> str:
    """A time in three digits: 850 µs, 12.3 ms, 4.56 s."""
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        # Of 999.9 ms three digits would make 1e+03.
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"
