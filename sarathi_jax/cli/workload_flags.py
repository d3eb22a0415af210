"""The flags that say what arrives, for every verb that serves or simulates a workload."""

from absl import flags

from sarathi_jax.cli.fields import UsageError, define_fields, given_fields
from sarathi_jax.workloads import Workload, WorkloadError, Workloads, WorkloadSpec

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

    Raises:
      UsageError: values that cannot be.
    """
    try:
        return WorkloadSpec(**given_fields(values, WorkloadSpec, skip=skip))
    except WorkloadError as error:
        raise UsageError(str(error)) from None


def workloads_of(values: flags.FlagValues, model_context: int | None = None, skip: tuple[str, ...] = ()) -> Workloads:
    """The workload of the command line at any rate: ``workloads_of(values, 4096).at(rate, seed)``.

    Args:
      values: with the flags of `define_workload_flags`.
      model_context: most tokens of a request that can be served; longer lengths are scaled to it.
      skip: as there.

    Raises:
      UsageError: values that cannot be.
      WorkloadError: no such trace, or lengths that the model cannot serve.
    """
    return workload_spec(values, skip).open(model_context)


def workload_of(values: flags.FlagValues, model_context: int | None = None) -> Workload:
    """The workload of the command line, at its rate and seed; arguments and errors as of `workloads_of`."""
    spec = workload_spec(values)
    if spec.has_rate and spec.rate is None:
        raise UsageError("--rate is missing: how many requests a second; or say --arrivals static")
    return spec.open(model_context).at(spec.rate, spec.seed)
