"""Comparisons: our ratios beside the paper's, and choices by cost."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from sarathi_jax.telemetry.plots.style import NOTE_COLOUR, PlotError, picture

_OURS, _PAPER = "#0072b2", "#bdbdbd"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A point of `pareto`.

    Attributes:
      label: what was chosen between.
      cost: what it costs.
      value: what one gets for it.
      state: rejected choices are drawn as crosses.
    """

    label: str
    cost: float
    value: float
    state: Literal["chosen", "possible", "rejected"] = "possible"


def bars(
    table: Mapping[str, float],
    paper: Mapping[str, float],
    path: Path,
    *,
    what: str = "ratio",
    title: str = "Ours and the paper's",
) -> None:
    """Our numbers beside the paper's, a pair of bars each, and what ours is of the paper's.

    Args:
      table: ours by name; drawn in this order.
      paper: the paper's by the same names; a missing one has no bar.
      path: of the picture.
      what: the numbers are.
      title: over the picture.

    Raises:
      PlotError: no numbers, or see `picture`.
    """
    if not table:
        raise PlotError(f"{path}: there are no numbers to draw")
    with picture(path, (8, 1.3 + 0.5 * len(table))) as axes:
        for row, (name, value) in enumerate(table.items()):
            theirs = paper.get(name)
            axes.barh(row - 0.19, value, 0.36, color=_OURS, label="ours" if not row else None)
            text = f" {value:.3g}"
            if theirs is not None:
                axes.barh(row + 0.19, theirs, 0.36, color=_PAPER, label="the paper's" if not row else None)
                axes.text(theirs, row + 0.19, f" {theirs:.3g}", va="center", color=NOTE_COLOUR, size=9)
                text += f"  ({value / theirs:.2f} of the paper's)" if theirs else ""
            axes.text(value, row - 0.19, text, va="center", color=_OURS, size=9)
        axes.set_yticks(range(len(table)), list(table))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * max([*table.values(), *paper.values()]))
        axes.axvline(1, color=NOTE_COLOUR, ls=":", lw=1)
        axes.set_xlabel(what)
        axes.legend(loc="lower right")
        axes.set_title(title)


def pareto(
    points: Sequence[Choice],
    path: Path,
    *,
    cost: str = "cost",
    value: str = "requests/s",
    higher_is_better: bool = True,
    title: str = "What each choice costs and gives",
) -> None:
    """Choices by cost and value: the front that no other beats, the chosen one with a ring, rejected ones as crosses.

    Args:
      points: in any order.
      path: of the picture.
      cost, value: names of the axes.
      higher_is_better: of the value.
      title: over the picture.

    Raises:
      PlotError: no points, or see `picture`.
    """
    if not points:
        raise PlotError(f"{path}: there are no choices to draw")
    sign = 1 if higher_is_better else -1
    with picture(path, (8.5, 5)) as axes:
        allowed = [point for point in points if point.state != "rejected"]
        front = front_of(allowed, higher_is_better)
        if front:
            edge = [(point.cost, point.value) for point in front]
            axes.step(*zip(*edge, strict=True), where="post", color=_OURS, lw=1.2, alpha=0.6, label="none is better")
        styles = {
            "rejected": {"marker": "x", "color": "#b2182b"},
            "possible": {"marker": "o", "color": _OURS},
            "chosen": {"marker": "*", "s": 190, "color": "#009e73", "zorder": 3},
        }
        for state, style in styles.items():
            of_state = [point for point in points if point.state == state]
            axes.scatter([p.cost for p in of_state], [p.value for p in of_state], label=state, **style)
        for point in points:
            is_named = point.state == "chosen" or point in front or len(points) <= 16
            if is_named:
                colour = NOTE_COLOUR if point.state == "rejected" else "black"
                axes.annotate(
                    point.label,
                    (point.cost, point.value),
                    (5, 5 * sign),
                    textcoords="offset points",
                    size=8,
                    color=colour,
                    va="bottom" if sign > 0 else "top",
                )
        axes.margins(0.14)
        axes.set(xlabel=cost, ylabel=value)
        axes.grid(color="#eeeeee", lw=0.6)
        axes.legend(loc="best")
        axes.set_title(title)


def front_of(points: Sequence[Choice], higher_is_better: bool = True) -> list[Choice]:
    """The choices of which none costs less and gives as much, by rising cost."""
    sign, front = 1 if higher_is_better else -1, []
    for point in sorted(points, key=lambda point: (point.cost, -sign * point.value)):
        if not front or sign * point.value > sign * front[-1].value:
            front.append(point)
    return front
