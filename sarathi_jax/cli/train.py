"""Trains a small decoder with its own tokenizer on English text; the defaults are the recipe of the shipped model.

  PROGRAM train --corpus texts/ --out checkpoints/mine
  PROGRAM train --corpus texts/ --out /tmp/tiny --phases 50x128x4 --num_layers 2   # a minute, to see it work

Shows its progress, saves as it goes (run the same command again after a kill and it goes on), and leaves the
checkpoint, its tokenizer and its loss curve in the folder --out.
"""

from collections.abc import Sequence

from absl import flags

from sarathi_jax.cli.fields import UsageError, define_fields, given_fields
from sarathi_jax.config import ConfigError

SUMMARY = "trains a small model with its own tokenizer"


def define(values: flags.FlagValues) -> None:
    """Defines one flag for each field of `TrainConfig`."""
    from sarathi_jax.training.settings import DEFAULT_PHASES, TrainConfig

    default = ",".join(f"{phase.steps}x{phase.length}x{phase.batch}" for phase in DEFAULT_PHASES)
    define_fields(values, TrainConfig, skip=("phases",))
    flags.DEFINE_string(
        "phases", default, "STEPSxLENGTHxBATCH with commas between: shapes of the steps, in order.", flag_values=values
    )


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Trains; returns the exit status."""
    from sarathi_jax.training.settings import TrainConfig

    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; everything is given by flags")
    fields = given_fields(values, TrainConfig, skip=("phases",))
    for name in ("corpus", "out"):
        if name not in fields:
            raise UsageError(f"--{name} is missing")
    fields["phases"] = _phases(values.phases)
    try:
        config = TrainConfig(**fields)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    # Here, so that wrong flags are answered without waiting for jax.
    from sarathi_jax.training.trainer import train

    train(config)
    return 0


def _phases(text: str) -> tuple:
    from sarathi_jax.training.settings import Phase

    try:
        return tuple(Phase(*map(int, item.split("x"))) for item in text.split(","))
    except (ValueError, TypeError):
        raise UsageError(f"--phases={text}: write STEPSxLENGTHxBATCH with commas between, like 1400x256x16") from None
