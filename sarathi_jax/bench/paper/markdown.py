"""Tables of Markdown, and our numbers beside the paper's."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One number of ours and the paper's.

    Attributes:
      what: is compared.
      ours: here.
      paper: there; None: the paper gives none, or we know of none.
      unit: of both, "" for a ratio.
      why: they differ, or what else to know.
    """

    what: str
    ours: float
    paper: float | None = None
    unit: str = ""
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours to the paper's."""
        return self.ours / self.paper if self.paper else None


@dataclasses.dataclass(frozen=True)
class Order:
    """Who does best, ours and the paper's.

    Attributes:
      what: is compared.
      ours, paper: names, best first.
    """

    what: str
    ours: tuple[str, ...]
    paper: tuple[str, ...]

    @classmethod
    def of(cls, what: str, ours: Mapping[str, float], paper: Mapping[str, float]) -> "Order":
        """Orders the names that both have; less is better."""
        names = [name for name in ours if name in paper]
        return cls(what, *(tuple(sorted(names, key=values.__getitem__)) for values in (ours, paper)))

    @property
    def is_papers(self) -> bool:
        """Whether both are the same."""
        return self.ours == self.paper


def order_list(orders: Sequence[Order]) -> str:
    """A Markdown list."""
    return "\n".join(
        f"- {order.what}, best first: {', '.join(order.ours)}; "
        + ("as in the paper." if order.is_papers else f"in the paper {', '.join(order.paper)}.")
        for order in orders
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats in three digits."""
    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else str(value)


def number(value: float, digits: int = 3) -> str:
    """A number in so many digits, never with an exponent."""
    if value != value or value in (float("inf"), -float("inf")):
        return str(value)
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{float(text):,.0f}" if abs(value) >= 1 else f"{value:.6f}"


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Ours and the paper's side by side, the ratio, and why they differ."""
    rows = []
    for one in comparisons:
        unit = f" {one.unit}" if one.unit else ""
        paper = "-" if one.paper is None else f"{number(one.paper)}{unit}"
        ratio = "-" if one.ratio is None else f"{one.ratio:.2f}"
        rows.append([one.what, f"{number(one.ours)}{unit}", paper, ratio, one.why])
    has_why = any(one.why for one in comparisons)
    header = ["what", "ours", "paper", "ours / paper", "why they differ"]
    return table(header if has_why else header[:-1], rows if has_why else [row[:-1] for row in rows])
