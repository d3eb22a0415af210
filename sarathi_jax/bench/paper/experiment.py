"""`Experiment`: what a file of ``configs/experiments`` asks for; `Section`: what a kind of experiment answers."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sarathi_jax.config import ConfigError, read_yaml

Draw = Callable[[Path], None]
"""Draws a picture into the file of that path."""


class ExperimentError(ConfigError):
    """An experiment that cannot be run; the message names the file and says what to change."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One figure or table of the paper, or one idea of it.

    Attributes:
      name: of the file, without ending; the page gets it too.
      title: of the page.
      kind: which module runs it, see `kinds`.
      asks: what it is about, and what the paper shows, in a few sentences.
      settings, paper: what is run, the paper's numbers; see `Settings` and `Paper` of the kind.
      notes: Markdown by whoever looked at the results: why ours and the paper's differ.
      path: of the file.
    """

    name: str
    title: str
    kind: str
    asks: str
    settings: Mapping[str, Any]
    paper: Mapping[str, Any]
    notes: str
    path: Path

    def settings_as[T](self, wanted: type[T]) -> T:
        """The settings as a dataclass.

        Raises:
          ExperimentError: an unknown or missing key, or a value of another type.
        """
        return read_fields(wanted, self.settings, f"{self.path}: settings")

    def paper_as[T](self, wanted: type[T]) -> T:
        """The paper's numbers as a dataclass; raises as `settings_as` does."""
        return read_fields(wanted, self.paper, f"{self.path}: paper")


@dataclasses.dataclass(frozen=True)
class Options:
    """How experiments are run.

    Attributes:
      quick: smaller, to see that everything works; the figures are not to be quoted.
      processes: that share the simulations of an experiment.
      data: folder of published measurements and traces that are no part of the project; None: without them.
    """

    quick: bool = False
    processes: int = 1
    data: Path | None = None

    def find(self, name: str) -> Path | None:
        """A file of `data` or of a folder in it; None: it is not there."""
        if self.data is None:
            return None
        return next(iter(sorted(self.data.rglob(name))), None)


@dataclasses.dataclass(frozen=True)
class Section:
    """What came of an experiment.

    Attributes:
      verdict: one line for the index.
      text: Markdown: ours and the paper's side by side, and why they differ.
      tables: rows of a CSV file each, by name; all rows of one have the same keys.
      pictures: by name; draws itself, or is copied from a path.
    """

    verdict: str
    text: str
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, Draw | Path] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Document:
    title: str
    kind: str
    asks: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    paper: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: str = ""


def read_experiment(path: Path) -> Experiment:
    """Reads a file; its settings are looked at by `kinds.load_experiment`.

    Raises:
      ExperimentError: it cannot be read, or its keys are others.
    """
    try:
        document = read_yaml(path)
    except ConfigError as error:
        raise ExperimentError(str(error)) from None
    read = read_fields(_Document, document, str(path))
    asks = " ".join(read.asks.split())
    return Experiment(path.stem, read.title, read.kind, asks, read.settings, read.paper, read.notes.strip(), path)


def read_fields[T](wanted: type[T], fields: Any, where: str) -> T:
    """A dataclass from keys and values: lists become tuples, nested mappings the dataclasses that are declared.

    Args:
      wanted: whose fields are the only keys allowed.
      fields: as YAML has them.
      where: they stand, for messages.

    Raises:
      ExperimentError: an unknown or missing key, or a value of another type.
    """
    if not isinstance(fields, Mapping):
        raise ExperimentError(f"{where}: there must be keys and values, not {fields!r}")
    hints = typing.get_type_hints(wanted)
    declared: Any = wanted
    known = {field.name: field for field in dataclasses.fields(declared)}
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ExperimentError(
                f"{where}: unknown key {key!r}; "
                + (f"do you mean {near[0]}?" if near else f"known: {', '.join(known)}")
            )
    missing = [
        name
        for name, field in known.items()
        if name not in fields and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ExperimentError(f"{where}: {', '.join(missing)} must be given")
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in fields.items()}
    try:
        return wanted(**values)
    except ValueError as error:
        raise ExperimentError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value as its declared type; int serves as float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        return _value(next(one for one in arguments if one is not types.NoneType), value, where)
    if dataclasses.is_dataclass(hint):
        return read_fields(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) == len(value):
            return tuple(map(_value, arguments, value, [where] * len(value)))
    if origin is dict and isinstance(value, Mapping):
        return {_value(arguments[0], k, where): _value(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is typing.Literal and value in arguments:
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ExperimentError(f"{where}: {value!r} is no {getattr(hint, '__name__', hint)}")
