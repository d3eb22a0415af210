"""From a path and settings to replicas that serve: what the library and the server do alike."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sarathi_jax.compiling import use_compile_cache
from sarathi_jax.config import CacheConfig, Dtype, EngineConfig, ModelConfig
from sarathi_jax.engine import Engine
from sarathi_jax.executor import follow
from sarathi_jax.parallel import check_split
from sarathi_jax.parallel.hosts import Hosts, join
from sarathi_jax.program_store import ProgramStore
from sarathi_jax.replica import Replica, Replicas, start_replicas
from sarathi_jax.resources import checkpoint_path
from sarathi_jax.runner import StartUp
from sarathi_jax.tokenizer import Tokenizer, load_tokenizer
from sarathi_jax.weights.checkpoint import stored_dtype
from sarathi_jax.weights.directory import load_model_config, load_model_yaml


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model on its devices, compiled.

    Attributes:
      path: of the model.
      engine_config: with `dtype` resolved.
      tokenizer: None where the model has none.
      replicas: at least one.
      hosts: the processes of the replica, if there are several.
    """

    path: Path
    model_config: ModelConfig
    engine_config: EngineConfig
    tokenizer: Tokenizer | None
    replicas: tuple[Replica, ...]
    hosts: Hosts | None

    @property
    def cache_config(self) -> CacheConfig:
        return self.replicas[0].cache

    def engine(self) -> Engine | Replicas:
        """The step loop over all replicas."""
        engines = [replica.engine for replica in self.replicas]
        return engines[0] if len(engines) == 1 else Replicas(engines)

    @property
    def start_up(self) -> StartUp:
        """What compiling cost, over all replicas."""
        each = [replica.runner.start_up for replica in self.replicas]
        return StartUp(
            num_programs=sum(one.num_programs for one in each),
            compile_s=sum(one.compile_s for one in each),
            temp_bytes=max(one.temp_bytes for one in each),
        )

    @property
    def num_late_compiles(self) -> int:
        """Programs compiled after warm-up; anything but 0 is a bug."""
        return sum(replica.runner.num_late_compiles for replica in self.replicas)

    def close(self) -> None:
        """Lets the other processes go, if there are any."""
        if self.hosts is not None:
            self.hosts.close()


def load(
    model: str | Path | None,
    dtype: Dtype | Literal["auto"],
    progress: bool,
    config: Mapping[str, Any],
    *,
    timed: bool = False,
) -> Loaded:
    """Loads a model as `LLM` describes it.

    With several hosts this returns in the first process alone: the others serve it from here until it closes.

    Args:
      model: as of `LLM`.
      dtype: as of `LLM`.
      progress: shows bars.
      config: fields of `EngineConfig`.
      timed: the programs' times are wanted even if nothing is promised.

    Raises:
      ConfigError, WeightsError, HostsError, SystemExit: as `LLM`.
    """
    path = checkpoint_path() if model is None else Path(model)
    compile_cache = use_compile_cache()
    settings = EngineConfig(**config)
    is_yaml = path.suffix in (".yaml", ".yml")
    model_config = load_model_yaml(path) if is_yaml else load_model_config(path)
    check_split(model_config, settings)
    # Before anything touches a device.
    hosts = join(settings.hosts, settings.host_id, settings.coordinator) if settings.hosts > 1 else None
    if dtype == "auto":
        dtype = "bfloat16" if is_yaml else stored_dtype(path, model_config)
    settings = dataclasses.replace(settings, dtype=dtype)
    tokenizer = None if is_yaml else load_tokenizer(path)
    store = ProgramStore(compile_cache / "programs") if hosts is None else None
    try:
        replicas = start_replicas(path, model_config, settings, tokenizer, hosts, progress, timed, store)
    except Exception as error:
        if hosts is not None:
            hosts.abandon(str(error))
        raise
    if hosts is not None and not hosts.is_leader:
        follow(replicas[0].runner, hosts)
        hosts.close()
        raise SystemExit(0)
    return Loaded(path, model_config, settings, tokenizer, replicas, hosts)
