"""absl flags out of frozen dataclasses: names, types and defaults from the fields, help from the docstring."""

import collections.abc
import dataclasses
import inspect
import json
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from absl import flags

UNSET = "none"


class UsageError(ValueError):
    """A command line that makes no sense; the message says what to write instead."""


class _Optional(flags.ArgumentParser):
    """Another parser's values, or the word `none`."""

    def __init__(self, inner: flags.ArgumentParser):
        super().__init__()
        self.inner = inner
        self.syntactic_help = inner.syntactic_help

    def parse(self, argument: Any) -> Any:
        return None if argument is None or argument == UNSET else self.inner.parse(argument)


class _IntList(flags.ArgumentParser):
    syntactic_help = "integers with commas between"

    def parse(self, argument: Any) -> tuple[int, ...]:
        if not isinstance(argument, str):
            return tuple(argument)
        try:
            return tuple(int(item) for item in argument.split(",") if item.strip())
        except ValueError:
            raise ValueError(f"{argument!r} is not a list like 5,17,23") from None


class _Path(flags.ArgumentParser):
    def parse(self, argument: Any) -> Path:
        return Path(argument).expanduser()


class _BiasTable(flags.ArgumentParser):
    syntactic_help = "TOKEN_ID:BIAS with commas between"

    def parse(self, argument: Any) -> dict[int, float]:
        if not isinstance(argument, str):
            return dict(argument)
        try:
            pairs = [item.split(":") for item in argument.split(",") if item.strip()]
            return {int(token): float(bias) for token, bias in pairs}
        except ValueError:
            raise ValueError(f"{argument!r} is not a list like 5:-100,17:2.5") from None


class _JsonObject(flags.ArgumentParser):
    syntactic_help = "a JSON object"

    def parse(self, argument: Any) -> dict[str, Any]:
        try:
            value = json.loads(argument) if isinstance(argument, str) else argument
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{argument!r} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{argument!r} is not a JSON object")
        return value


def define_fields(
    values: flags.FlagValues,
    cls: type,
    *,
    skip: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Defines one flag for each field of a dataclass.

    Args:
      values: where the flags go.
      cls: a dataclass whose docstring explains its fields under `Attributes:`.
      skip: fields without a flag.
      defaults: defaults of this command that differ from the class's.
      texts: help of fields that the docstring does not list by themselves.
    """
    docs = field_docs(cls) | dict(texts or {})
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in skip:
            default = (defaults or {}).get(field.name, _default(field))
            _define(values, field.name, hints[field.name], default, docs.get(field.name, ""))


def given_fields(
    values: flags.FlagValues, cls: type, *, skip: Collection[str] = (), always: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of a dataclass that the command line names (and those in `always`), as keyword arguments."""
    names = [field.name for field in dataclasses.fields(cls) if field.name in values and field.name not in skip]
    given = {name: values[name].value for name in names if values[name].present or name in always}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def field_docs(cls: type) -> dict[str, str]:
    """What a dataclass's docstring says of each field under `Attributes:`; a line may name several."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    section = re.split(r"\n\S", section)[0]
    docs = {}
    for entry in re.split(r"\n(?=  \S)", section):
        names, _, text = entry.strip().partition(": ")
        for name in names.split(", "):
            docs[name] = " ".join(text.split()).replace("`", "").replace("None", UNSET)
    return docs


def parse(values: flags.FlagValues, verb: str, arguments: list[str]) -> list[str]:
    """Reads a command line; returns what is not a flag.

    Raises:
      UsageError: an unknown flag (with the nearest known one) or a malformed value.
    """
    try:
        return values([verb, *arguments])[1:]
    except flags.Error as error:
        text = " ".join(str(error).split()).replace("Unknown command line flag", "unknown flag")
        raise UsageError(f"{text}; see {verb} --help") from None


def describe(values: flags.FlagValues) -> str:
    """The flags with their help, one paragraph each, as wide as the terminal up to 110 columns."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = []
    for name in _in_order(values):
        flag = values[name]
        kind = "" if flag.boolean else f"={_metavar(flag)}"
        # A default that is a list of texts is too long to show.
        empty = flag.default in (None, (), {}) or flag.default is False or isinstance(flag.default, list)
        default = "" if empty else f" (default {str(flag.default).lower() if flag.boolean else flag.default})"
        lines.append(f"  --{'[no]' if flag.boolean else ''}{name}{kind}")
        text = (flag.help or "").replace("(no help available)", "")  # absl's words for a flag without
        lines += textwrap.wrap((text + default).strip(), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _in_order(values: flags.FlagValues) -> list[str]:
    """Names in the order of definition."""
    return [flag.name for group in values.flags_by_module_dict().values() for flag in group]


def _metavar(flag: flags.Flag) -> str:
    parser = flag.parser.inner if isinstance(flag.parser, _Optional) else flag.parser
    match parser:
        case _IntList():
            return "INT,INT"
        case _BiasTable():
            return "ID:BIAS,ID:BIAS"
        case _JsonObject():
            return "JSON"
        case _Path():
            return "PATH"
        case flags.EnumParser():
            return "|".join(parser.enum_values)
        case _:
            return {"int": "INT", "float": "NUMBER"}.get(parser.flag_type(), "TEXT")


_PARSERS = {int: flags.IntegerParser, float: flags.FloatParser, str: flags.ArgumentParser, Path: _Path}


def _default(field: dataclasses.Field) -> Any:
    """The field's default; None for a field that must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _define(values: flags.FlagValues, name: str, hint: Any, default: Any, text: str) -> None:
    # `Literal[...] | None` is a typing.Union before Python 3.14, the other unions are types.UnionType.
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    arms = typing.get_args(hint) if is_union else (hint,)
    optional = types.NoneType in arms
    kinds = [arm for arm in arms if arm is not types.NoneType]
    kind = kinds[0]
    origin = typing.get_origin(kind)
    if kind is bool:
        flags.DEFINE_boolean(name, default, text, flag_values=values)
        return
    is_list = origin in (collections.abc.Sequence, tuple)
    if (kind is str and len(kinds) > 1) or (is_list and typing.get_args(kind)[0] is str):
        flags.DEFINE_multi_string(name, list(default) or None, text.rstrip("."), flag_values=values)
        return
    if origin is typing.Literal:
        parser = flags.EnumParser(list(typing.get_args(kind)))
    elif origin is collections.abc.Mapping:
        parser = _BiasTable()
    elif dataclasses.is_dataclass(kind):
        parser = _JsonObject()
    elif is_list:
        parser = _IntList()
    else:
        parser = _PARSERS[kind]()
    flags.DEFINE(_Optional(parser) if optional else parser, name, default, text, flag_values=values)
