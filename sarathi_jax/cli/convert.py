"""Turns a model folder of one format into the other, one tensor at a time.

  PROGRAM convert ~/models/qwen3-0.6b ~/models/qwen3-0.6b-orbax --format orbax
  PROGRAM convert ~/models/qwen3-0.6b-orbax ~/models/again --format hf --dtype float32

The tokenizer and the configuration go along. The target must not exist; a failure leaves no half-written target.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sarathi_jax.cli.fields import UNSET, UsageError
from sarathi_jax.config import DTYPES

SUMMARY = "turns a Hugging Face folder into an Orbax checkpoint, or back"

FORMATS = ("hf", "orbax")


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""
    flags.DEFINE_enum("format", None, FORMATS, "format to write.", flag_values=values)
    flags.DEFINE_enum(
        "dtype", UNSET, [*DTYPES, UNSET], f"type of the written weights; {UNSET}: as they are.", flag_values=values
    )


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Converts; returns the exit status."""
    if len(arguments) != 2 or values.format is None:
        raise UsageError(f"convert needs two folders and a format: convert SOURCE TARGET --format {'|'.join(FORMATS)}")
    # Here, so that --help is answered without waiting for jax.
    from sarathi_jax.weights.convert import convert

    source, target = (Path(argument).expanduser() for argument in arguments)
    dtype = None if values.dtype == UNSET else values.dtype
    convert(source, target, values.format, dtype=dtype, progress=sys.stderr.isatty())
    print(f"wrote {target}", file=sys.stderr)
    return 0
