"""The flags that say what arrives, for every verb that serves or simulates a workload."""

from absl import flags

from sarathi_jax.cli.fields import UsageError, define_fields, given_fields
from sarathi_jax.workloads import WorkloadError, WorkloadSpec

NOT_OF_THE_ENGINE = ("seed",)
"""Fields of `EngineConfig` to leave out of a verb with these flags: --seed is the workload's."""


def define_workload_flags(values: flags.FlagValues, skip: tuple[str, ...] = ()) -> None:
    """Defines one flag for each field of `WorkloadSpec`.

    Args:
      values: where the flags go.
      skip: fields that this verb does not have, such as the rate that it looks for.
    """
    define_fields(values, WorkloadSpec, skip=skip)


def workload_spec(values: flags.FlagValues, skip: tuple[str, ...] = ()) -> WorkloadSpec:
    """What the command line says, checked as far as can be without a model and a file.

    Args:
      values: with the flags of `define_workload_flags`.
      skip: as there.

    Raises:
      UsageError: values that cannot be, or no rate where arrivals need one.
    """
    try:
        spec = WorkloadSpec(**given_fields(values, WorkloadSpec, skip=skip))
    except WorkloadError as error:
        raise UsageError(str(error)) from None
    if spec.has_rate and spec.rate is None and "rate" not in skip:
        raise UsageError("--rate is missing: how many requests a second; or say --arrivals static")
    return spec
