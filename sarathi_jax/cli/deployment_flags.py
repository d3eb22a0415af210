"""The flags that say what is simulated: a model, devices that need not be at hand, how long their steps take."""

import difflib
from pathlib import Path

from absl import flags

from sarathi_jax.cli.fields import UsageError
from sarathi_jax.cli.model_flags import define_model_flags, model_arguments
from sarathi_jax.cli.workload_flags import NOT_OF_THE_ENGINE
from sarathi_jax.config import ConfigError, Dtype, EngineConfig, ModelConfig
from sarathi_jax.latency import DEVICES, PUBLISHED_STACK, DeviceError, HostTerm, LatencyTable, TableError, device_of
from sarathi_jax.resources import checkpoint_path, config_names
from sarathi_jax.simulate import Deployment
from sarathi_jax.simulate.memory import cache_of

SKIP = (*NOT_OF_THE_ENGINE, "hosts", "host_id", "coordinator", "overlap", "attention_backend")
"""Fields of `EngineConfig` that mean nothing to a simulation, or are the workload's."""

_DEFAULT_DEVICE = "a100-80gb"


def define_deployment_flags(values: flags.FlagValues, skip: tuple[str, ...] = ()) -> None:
    """Defines the flags of a simulation, then the model's.

    Args:
      values: where the flags go.
      skip: flags that this verb does not have, of the simulation or fields of `EngineConfig`.
    """
    if "device" not in skip:
        flags.DEFINE_string(
            "device",
            _DEFAULT_DEVICE,
            f"one of {', '.join(DEVICES)}, or a file that calibrate wrote.",
            flag_values=values,
        )
    if "table" not in skip:
        flags.DEFINE_string(
            "table", None, "step times that main.py profile measured, in place of a roofline's.", flag_values=values
        )
    flags.DEFINE_enum(
        "host",
        "none",
        ["none", "published"],
        "what the serving stack adds to the kernels: none, as an engine that keeps its device busy; published, as the "
        "stack that the paper measured.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "pads",
        True,
        "a step takes the time of its bucket, as compiled programs do; no: of its tokens.",
        flag_values=values,
    )
    define_model_flags(values, (*SKIP, *skip))
    values["model"].help = (
        "model folder, or one of configs/models: " + ", ".join(config_names("models")) + "; without it the small "
        "model that ships."
    )


def model_and_engine(values: flags.FlagValues, skip: tuple[str, ...] = ()) -> tuple[ModelConfig, EngineConfig]:
    """The model and the settings of the command line; no weights are read.

    Raises:
      UsageError: no such model or deployment, or values that cannot be.
    """
    given = model_arguments(values, (*SKIP, *skip))
    engine = {name: value for name, value in given.engine.items() if name not in SKIP}
    path = checkpoint_path() if given.model is None else given.model
    # Here, so that --help is answered at once.
    from sarathi_jax.resources import config_path
    from sarathi_jax.weights.directory import load_model_config, load_model_yaml

    if str(path) in config_names("models"):
        path = config_path("models", str(path))
    if not path.exists():
        near = difflib.get_close_matches(str(path), config_names("models"), n=3, cutoff=0.4)
        hint = f"do you mean {' or '.join(near)}?" if near else f"there are {', '.join(config_names('models'))}"
        raise UsageError(f"--model={path} is no folder, nor one of configs/models; {hint}")
    try:
        model = load_model_yaml(path) if path.suffix in (".yaml", ".yml") else load_model_config(path)
        return model, EngineConfig(dtype=_dtype(given.dtype, path, model), **engine)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def deployment_of(values: flags.FlagValues) -> Deployment:
    """What the command line says is simulated; it fits into its devices.

    Raises:
      UsageError: no such model, device or table, or a deployment that cannot be.
      TableError: a file that is no latency table, or not of these buckets.
    """
    try:
        device = device_of(values.device)
    except DeviceError as error:
        raise UsageError(f"--device: {error}") from None
    model, engine = model_and_engine(values)
    table = None
    if values.table is not None:
        table = LatencyTable.load(Path(values.table).expanduser())
        if missing := sorted(set(engine.buckets) - set(table.buckets)):
            raise TableError(
                f"{values.table} has no times of bucket {', '.join(map(str, missing))}: choose --token_buckets among "
                f"{','.join(map(str, table.buckets))}, or measure again"
            )
        if engine.pp > 1:
            raise UsageError("--table has times of a whole model: it cannot be used with --pp")
    deployment = Deployment(model, device, engine, table, host_of(values), values.pads)
    try:
        cache_of(deployment)
        if table is None:
            deployment.roofline()
    except ValueError as error:
        raise UsageError(str(error)) from None
    return deployment


def host_of(values: flags.FlagValues) -> HostTerm | None:
    """The host term of --host."""
    return PUBLISHED_STACK if values.host == "published" else None


def describe_deployment(deployment: Deployment) -> str:
    """What is simulated, in a line."""
    engine, cache = deployment.engine, cache_of(deployment)
    num_devices = engine.dp * engine.tp * engine.pp
    what = "measured step times" if deployment.table is not None else f"{num_devices} x {deployment.device.name}"
    promise = "" if engine.tbt_slo_ms is None else f", {engine.tbt_slo_ms:g} ms promised"
    return (
        f"{what}: dp={engine.dp} tp={engine.tp} pp={engine.pp}, policy {engine.policy}, steps of up to "
        f"{engine.buckets[-1]} tokens{promise}, at most {engine.max_num_seqs} sequences, a cache of "
        f"{cache.num_blocks * cache.block_size:,} tokens each"
    )


def _dtype(given: str, path: Path, model: ModelConfig) -> Dtype:
    """Of --dtype; auto: as the weights are stored, bfloat16 where there are none."""
    if given != "auto":
        return given  # type: ignore[return-value]
    if not path.is_dir():
        return "bfloat16"
    from sarathi_jax.weights.checkpoint import stored_dtype

    return stored_dtype(path, model)
