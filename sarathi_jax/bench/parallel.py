"""A mesh before it is paid for: collectives and memory of each stage's program, and how long its stages wait.

  python -m sarathi_jax.bench.parallel --deployment llama2-70b-8xa40
  python -m sarathi_jax.bench.parallel --model falcon-180b --tp 4 --pp 2 --token_budget 512
  python -m sarathi_jax.bench.parallel --bubbles --pp 4 --picture docs/pipeline.svg

Nothing is loaded or allocated for the first two, and by default the devices are virtual: what the programs exchange
and hold is as on others, their scratch memory is that of the platform that compiles. With `--bubbles` a tiny model runs
in a pipeline of sleeping stages, once by the policy sarathi and once with whole prompts (vllm), on the same requests.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from pallas_kernels.ragged_paged_attention import BACKENDS
from sarathi_jax.bench.bubbles import BUCKETS, Load, SlowPipeline, StageTime, bubbles_table
from sarathi_jax.bench.mesh_report import collectives_table, memory_table, report_stages
from sarathi_jax.bench.timeline import draw_timelines
from sarathi_jax.config import CacheConfig, EngineConfig
from sarathi_jax.deployment import load_deployment
from sarathi_jax.parallel import make_meshes
from sarathi_jax.resources import checkpoint_path, config_names, config_path
from sarathi_jax.weights.directory import load_model_config, load_model_yaml

_DEPLOYMENT = flags.DEFINE_string("deployment", None, "name of configs/deployments or YAML file: model and settings")
_MODEL = flags.DEFINE_string("model", None, "name of configs/models, YAML file or model folder; else the deployment's")
_TP = flags.DEFINE_integer("tp", None, "devices of a stage", lower_bound=1)
_PP = flags.DEFINE_integer("pp", None, "stages", lower_bound=1)
_TOKEN_BUDGET = flags.DEFINE_integer("token_budget", None, "tokens of the step that is compiled", lower_bound=1)
_PLATFORM = flags.DEFINE_string("platform", "cpu", "whose devices to compile for (cuda, tpu); cpu: virtual ones")
_BACKEND = flags.DEFINE_enum("attention_backend", "xla", tuple(BACKENDS), "attention kernel")
_ALL_LAYERS = flags.DEFINE_bool("all_layers", False, "compile all layers, which takes minutes, instead of a few")
_BUBBLES = flags.DEFINE_bool("bubbles", False, "run a pipeline of sleeping stages instead")
_REQUESTS = flags.DEFINE_integer("requests", 96, "requests of --bubbles", lower_bound=1)
_BASE_MS = flags.DEFINE_float("base_ms", 60, "time of a micro-batch in a stage of --bubbles, without its tokens")
_TOKEN_MS = flags.DEFINE_float("token_ms", 0.6, "and for each token of its bucket")
_PICTURE = flags.DEFINE_string("picture", None, "SVG file for the timelines of --bubbles")


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    if _BUBBLES.value:
        run_bubbles(_PP.value or 4)
    else:
        report_mesh()


def run_bubbles(num_stages: int) -> None:
    """Runs the same requests by every policy, prints what came out, and draws it."""
    _take_devices("cpu", 2 * num_stages)
    pipeline = SlowPipeline(num_stages, StageTime(_BASE_MS.value / 1e3, _TOKEN_MS.value / 1e3))
    load = Load.draw(_REQUESTS.value)
    timelines = [pipeline.run(policy, load) for policy in BUCKETS]
    print(bubbles_table(timelines))
    if _PICTURE.value:
        Path(_PICTURE.value).write_text(draw_timelines(timelines, begin_s=6, length_s=4), encoding="utf-8")


def report_mesh() -> None:
    """Prints the tables of a model on a mesh."""
    settings: dict[str, Any] = load_deployment(_DEPLOYMENT.value) if _DEPLOYMENT.value else {}
    path = _model_path(_MODEL.value) if _MODEL.value else settings.get("model", checkpoint_path())
    given = {"tp": _TP.value, "pp": _PP.value, "token_budget": _TOKEN_BUDGET.value, "attention_backend": _BACKEND.value}
    settings |= {name: value for name, value in given.items() if value is not None}
    settings |= {"hosts": 1, "token_buckets": None}
    settings.pop("model", None)
    engine = EngineConfig(**settings)
    model = load_model_yaml(path) if path.suffix in (".yaml", ".yml") else load_model_config(path)
    _take_devices(_PLATFORM.value, engine.tp * engine.pp)
    cache = CacheConfig(engine.num_blocks or 1024, engine.block_size, engine.max_model_len or model.max_position)
    meshes = make_meshes(model, engine, jax.devices())
    bucket, kind = engine.buckets[-1], jax.devices()[0].device_kind
    reports = report_stages(model, engine, cache, meshes, bucket, kind, short=not _ALL_LAYERS.value)
    print(f"a step of {bucket} tokens, tp={engine.tp}, pp={engine.pp}; memory and bytes are those of one device\n")
    print(memory_table(reports), collectives_table(reports), sep="\n\n")


def _model_path(name: str) -> Path:
    return config_path("models", name) if name in config_names("models") else Path(name)


def _take_devices(platform: str, number: int) -> None:
    """Before anything asks JAX for devices."""
    jax.config.update("jax_platforms", platform)
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", number)


if __name__ == "__main__":
    app.run(main)
