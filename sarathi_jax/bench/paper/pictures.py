"""Pictures that only these pages have, in the style of `sarathi_jax.telemetry.plots`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sarathi_jax.telemetry.plots.style import NOTE_COLOUR, line_styles, picture, plain_ticks

Points = Sequence[tuple[float, float]]
# Bars of one colour are told apart as lines are.
_HATCHES = {"-": "", "--": "//", ":": "..", "-.": "xx"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """A diagram of lines.

    Attributes:
      title: over it.
      lines: points by name, drawn through.
      x, y: names of the axes.
      marks: points by name that are not joined: measurements, the paper's numbers.
      x_scale, y_scale: "linear" or "log".
      verticals, horizontals: thin lines by name.
      from_zero: the y axis begins at 0.
    """

    title: str
    lines: Mapping[str, Points]
    x: str
    y: str
    marks: Mapping[str, Points] = dataclasses.field(default_factory=dict)
    x_scale: str = "linear"
    y_scale: str = "linear"
    verticals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    horizontals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    from_zero: bool = True


def panels(drawn: Sequence[Panel], path: Path, *, joined: str = "-o") -> None:
    """Diagrams side by side.

    Args:
      drawn: from left to right.
      path: of the picture.
      joined: line and marker of the points.
    """
    with picture(path, (1 + 4.7 * len(drawn), 4.2), ncols=len(drawn), squeeze=False) as grid:
        for axes, panel in zip(grid[0], drawn, strict=True):
            _draw(axes, panel, joined)


def grouped_bars(
    groups: Mapping[str, Mapping[str, float]],
    path: Path,
    *,
    title: str,
    y: str,
    marks: Mapping[str, Mapping[str, float]],
    y_scale: str = "linear",
) -> None:
    """Bars of several names in each group, and the paper's number as a black line over each.

    Args:
      groups: value by name, by group.
      path: of the picture.
      title: over it.
      y: name of the axis.
      marks: the paper's, in the same way; what is missing has no line.
      y_scale: "linear" or "log".
    """
    names = list(next(iter(groups.values())))
    width = 0.8 / len(names)
    with picture(path, (2 + 1.1 * len(groups) * max(2, len(names) / 2), 4.2)) as axes:
        for index, (name, style) in enumerate(line_styles(names).items()):
            places = [group + (index - (len(names) - 1) / 2) * width for group in range(len(groups))]
            values = [group[name] for group in groups.values()]
            hatch = _HATCHES[style["linestyle"]]
            axes.bar(
                places, values, 0.92 * width, color=style["color"], label=name, hatch=hatch, edgecolor="white", lw=0
            )
            for place, value, group in zip(places, values, groups, strict=True):
                theirs = marks.get(group, {}).get(name)
                top = value
                if theirs is not None:
                    axes.hlines(theirs, place - width / 2, place + width / 2, color="black", lw=2)
                    top = max(value, theirs)
                axes.annotate(f"{value:.3g}", (place, top), (0, 3), textcoords="offset points", ha="center", size=8)
        if any(marks.values()):
            axes.plot([], [], color="black", lw=2, label="the paper's")
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set(ylabel=y, yscale=y_scale)
        if y_scale == "log":
            plain_ticks(axes.yaxis)
            axes.set_ylim(0.7 * min(min(group.values()) for group in groups.values()), None)
        axes.margins(y=0.12)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
        axes.set_title(title)


def _draw(axes: Any, panel: Panel, joined: str) -> None:
    styles = line_styles([*panel.lines, *(name for name in panel.marks if name not in panel.lines)])
    for name, points in panel.lines.items():
        axes.plot(
            *zip(*points, strict=True),
            joined[-1],
            ls=styles[name]["linestyle"],
            ms=4,
            color=styles[name]["color"],
            label=name,
        )
    for name, points in panel.marks.items():
        label = name if name not in panel.lines else f"{name}, measured"
        axes.plot(*zip(*points, strict=True), "x", ms=7, mew=2, color=styles[name]["color"], label=label)
    axes.set(xscale=panel.x_scale, yscale=panel.y_scale, xlabel=panel.x, ylabel=panel.y)
    for axis, scale in ((axes.xaxis, panel.x_scale), (axes.yaxis, panel.y_scale)):
        if scale == "log":
            plain_ticks(axis)
    if panel.y_scale == "linear" and panel.from_zero:
        axes.set_ylim(0, None)
    for name, value in panel.verticals.items():
        axes.axvline(value, color=NOTE_COLOUR, ls=":", lw=1)
        axes.annotate(
            name,
            (value, 1),
            (3, -10),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            size=8,
            color=NOTE_COLOUR,
        )
    for name, value in panel.horizontals.items():
        axes.axhline(value, color=NOTE_COLOUR, ls=":", lw=1)
        axes.annotate(
            name,
            (0, value),
            (4, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            size=8,
            color=NOTE_COLOUR,
        )
    axes.grid(color="#eeeeee", lw=0.6)
    axes.legend(loc="best", fontsize=8)
    axes.set_title(panel.title)
