"""A replica: one engine with the devices, weights and programs that it needs; and several that share the requests."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sarathi_jax.config import CacheConfig, ConfigError, EngineConfig, ModelConfig
from sarathi_jax.engine import Engine
from sarathi_jax.executor import DeviceExecutor
from sarathi_jax.latency import StepTimes
from sarathi_jax.parallel import TensorSplit, make_meshes, put_parts, split_layers
from sarathi_jax.parallel.hosts import Hosts
from sarathi_jax.parallel.pipeline import is_local
from sarathi_jax.program_store import ProgramStore
from sarathi_jax.request import Request, RequestOutput, SamplingParams, StructuredOutputsParams
from sarathi_jax.runner import Runner
from sarathi_jax.sampling import SamplingTable
from sarathi_jax.scheduling.make import make_scheduler
from sarathi_jax.sizing import plan_cache
from sarathi_jax.telemetry.drift import DriftObserver
from sarathi_jax.timing import latency_table
from sarathi_jax.tokenizer import Tokenizer
from sarathi_jax.weights.checkpoint import load_parameters, random_parameters
from sarathi_jax.weights.quantized import put_on_default_device


@dataclasses.dataclass(frozen=True)
class Replica:
    """An engine and what is below it.

    Attributes:
      times: expected times of steps, where somebody wanted them.
    """

    engine: Engine
    runner: Runner
    cache: CacheConfig
    times: StepTimes | None = None


def start_replicas(
    path: Path,
    model: ModelConfig,
    engine: EngineConfig,
    tokenizer: Tokenizer | None,
    hosts: Hosts | None,
    progress: bool,
    timed: bool = False,
    store: ProgramStore | None = None,
) -> tuple[Replica, ...]:
    """`dp` replicas on devices of their own; arguments and errors as of `start_replica`.

    Raises:
      HostsError: the processes were started with different settings.
    """
    if hosts is not None:
        _agree(hosts, model, engine)
    devices, replicas = jax.devices(), []
    each = len(devices) // engine.dp
    if not each:
        raise ConfigError(f"dp={engine.dp} replicas need as many devices, there are {len(devices)}: lower dp")
    for i in range(engine.dp):
        # Each its own seeds, or the same prompt would be answered alike by all.
        config = engine if engine.seed is None else dataclasses.replace(engine, seed=engine.seed + i)
        own = devices[i * each : (i + 1) * each]
        replicas.append(start_replica(path, model, config, tokenizer, own, hosts, progress, timed, store))
    return tuple(replicas)


def start_replica(
    path: Path,
    model: ModelConfig,
    engine: EngineConfig,
    tokenizer: Tokenizer | None,
    devices: Sequence[Any],
    hosts: Hosts | None,
    progress: bool,
    timed: bool = False,
    store: ProgramStore | None = None,
) -> Replica:
    """Loads weights, sizes the cache, compiles the programs.

    Args:
      path: a model directory, or a YAML: then weights are random.
      model: of that path.
      engine: how it is served.
      tokenizer: of the model; None: token ids in, token ids out.
      devices: of this replica, in all its processes.
      hosts: its processes, if there are several.
      progress: shows bars.
      timed: the programs' times are wanted even if `engine` promises none.
      store: where programs may be found, and are kept; None: nowhere.

    Raises:
      ConfigError, WeightsError: as `LLM`.
    """
    meshes = make_meshes(model, engine, devices)
    params = _load(path, model, engine, meshes, progress)
    cache = plan_cache(model, engine, meshes, store)
    if hosts is not None:
        cache = dataclasses.replace(cache, num_blocks=hosts.minimum(cache.num_blocks))
    runner = Runner(model, params, engine, cache, meshes, progress, store)
    if hosts is not None:
        hosts.meet()  # compiling takes one longer than another
    times, is_leader = None, hosts is None or hosts.is_leader
    if is_leader and (timed or engine.tbt_slo_ms is not None or engine.ttft_slo_ms is not None):
        times = StepTimes(latency_table(model, engine, cache, runner, hosts, progress))
    return Replica(build_engine(model, engine, cache, runner, tokenizer, hosts, times), runner, cache, times)


def _agree(hosts: Hosts, model: ModelConfig, engine: EngineConfig) -> None:
    """Refuses processes that were started differently."""
    settings = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    for own in ("host_id", "coordinator", "seed"):
        del settings[own]
    hosts.agree(settings | {"the model": model, "the version of JAX": jax.__version__})


def build_engine(
    model: ModelConfig,
    engine: EngineConfig,
    cache: CacheConfig,
    runner: Runner,
    tokenizer: Tokenizer | None,
    hosts: Hosts | None = None,
    times: StepTimes | None = None,
) -> Engine:
    """Joins scheduler, executor and engine around a runner, and connects its devices where there are several.

    Args:
      times: of the steps, to keep the times that requests are promised; None: none can be.
    """
    scheduler = make_scheduler(model, engine, cache, times)
    sequences = {}
    sampling = SamplingTable(engine.max_running, model.vocab_size)
    executor = DeviceExecutor(runner, sampling, sequences, scheduler.table, hosts)
    if engine.tp * engine.pp > 1 and (hosts is None or hosts.is_leader):
        executor.warm_up()
    built = Engine(model, engine, cache, scheduler, executor, sequences, tokenizer)
    if times is not None:
        built.observe(DriftObserver(times, engine.pp))
    return built


def _load(
    path: Path, model: ModelConfig, engine: EngineConfig, meshes: Sequence[Mesh], progress: bool
) -> dict[int, dict[str, jax.Array]]:
    """The parameters of every stage that has devices in this process."""
    split, params = TensorSplit(model, engine.tp), {}
    for stage, mesh in zip(split_layers(model, engine), meshes, strict=True):
        if not is_local(mesh):
            continue
        is_default = mesh.devices.tolist() == [jax.devices()[0]]
        put = put_on_default_device if is_default else functools.partial(put_parts, split, mesh)
        settings: dict[str, Any] = {"quantization": engine.quantization, "put": put, "layers": stage.layers}
        if path.is_dir():
            loaded = load_parameters(path, model, engine.dtype, progress=progress, **settings)
        else:
            loaded = random_parameters(model, engine.dtype, 0, **settings)
        params[stage.index] = loaded
    return params


class Replicas:
    """Several engines as one (data parallelism): a request goes to the one that has the fewest."""

    def __init__(self, engines: Sequence[Engine]):
        self._engines = list(engines)
        self._owners: dict[str, Engine] = {}

    @property
    def engines(self) -> tuple[Engine, ...]:
        return tuple(self._engines)

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self._engines)

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, **more: Any
    ) -> Request:
        """As `Engine.add_request`."""
        engine = self._owners.get(request_id) or min(self._engines, key=lambda engine: engine.num_requests)
        request = engine.add_request(request_id, prompt_token_ids, params, **more)
        self._owners[request_id] = engine
        return request

    def compile_grammar(self, asked: StructuredOutputsParams) -> None:
        """As `Engine.compile_grammar`."""
        for engine in self._engines:
            engine.compile_grammar(asked)

    def abort(self, request_id: str) -> RequestOutput | None:
        """As `Engine.abort`."""
        engine = self._owners.pop(request_id, None)
        return None if engine is None else engine.abort(request_id)

    def end_sample(self, request_id: str, index: int, stop: str) -> RequestOutput | None:
        """As `Engine.end_sample`."""
        engine = self._owners.get(request_id)
        output = None if engine is None else engine.end_sample(request_id, index, stop)
        if output is not None:
            del self._owners[request_id]
        return output

    def step(self) -> list[RequestOutput]:
        """A step of every engine that has work."""
        outputs = [output for engine in self._engines if engine.has_work for output in engine.step()]
        for output in outputs:
            if output.finished:
                del self._owners[output.request_id]
        return outputs
