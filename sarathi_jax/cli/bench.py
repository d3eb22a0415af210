"""Serves a workload under an open load and tells every metric of the paper.

The small model that ships, in this process, with the paper's chat lengths scaled to its context:
  PROGRAM bench --trace chat --rate 2 --num_requests 200

Another policy, and everything kept: samples.csv, steps.csv, summary.json, trace.json (for ui.perfetto.dev), pictures:
  PROGRAM bench --trace chat --rate 2 --policy vllm --token_budget 2048 --out results/vllm

Other lengths and arrivals, and an end after two minutes, whatever is unfinished then:
  PROGRAM bench --lengths uniform:100-1000:10-100 --rate 3 --arrivals gamma:2 --time_limit_s 120
  PROGRAM bench --trace my_trace.csv --arrivals recorded:0.5

A server that runs already, ours or any with an OpenAI-compatible API; --model says which vocabulary it has:
  PROGRAM bench --url http://127.0.0.1:8000 --trace chat --rate 2 --api_key secret

Prompts are random tokens, or pieces of the text files of a folder:
  PROGRAM bench --texts documents/ --lengths fixed:512:64 --rate 1

Without the file of a trace its published quantiles serve, and the first line says so.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sarathi_jax.cli.fields import UsageError
from sarathi_jax.cli.model_flags import ModelArguments, define_model_flags, model_arguments
from sarathi_jax.cli.streams import keep_stdout
from sarathi_jax.cli.workload_flags import NOT_OF_THE_ENGINE, define_workload_flags, workload_spec
from sarathi_jax.workloads import TimedRequest, Workloads, WorkloadSpec, read_documents, text_prompts

if TYPE_CHECKING:
    from sarathi_jax.telemetry.run import Run
    from sarathi_jax.tokenizer import Tokenizer

SUMMARY = "serves a workload, here or at a URL, and measures it"


def define(values: flags.FlagValues) -> None:
    """Defines the flags: the workload's, those of the run, then the model's."""
    define_workload_flags(values)
    flags.DEFINE_string("texts", None, "folder of .txt and .md files to cut prompts from.", flag_values=values)
    flags.DEFINE_float(
        "time_limit_s", None, "ends the run; what has not come counts as longer than it waited.", flag_values=values
    )
    flags.DEFINE_float("slo_ms", None, "time between tokens to judge the run by.", flag_values=values)
    flags.DEFINE_string("out", None, "folder for tables, a trace and pictures.", flag_values=values)
    flags.DEFINE_string("url", None, "server to measure in place of an engine in this process.", flag_values=values)
    flags.DEFINE_string("api_key", None, "key of that server.", flag_values=values)
    flags.DEFINE_string(
        "served_model", None, "name of its model; without it the first that it lists.", flag_values=values
    )
    define_model_flags(values, NOT_OF_THE_ENGINE)


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Measures; returns the exit status."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; everything is given by flags")
    spec, model = workload_spec(values), model_arguments(values, NOT_OF_THE_ENGINE)
    for name in ("time_limit_s", "slo_ms"):
        value = getattr(values, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name}={value:g} must be above 0")
    if values.url is None:
        for name in ("api_key", "served_model"):
            if getattr(values, name) is not None:
                raise UsageError(f"--{name} goes with --url")
    elif model.engine:
        raise UsageError(f"--{next(iter(model.engine))} is for the server at --url to know: give it there")
    spec.open()  # what is wrong with it is told before a model is loaded
    if values.texts is not None and spec.groups is not None:
        raise UsageError("--groups are of random prompts: leave out --texts, or --groups and --shared_tokens")
    documents = None if values.texts is None else read_documents(Path(values.texts).expanduser())
    measured, about = (_here if values.url is None else _there)(values, spec, model, documents)

    from sarathi_jax.telemetry.plots import PlotError
    from sarathi_jax.telemetry.report import report, write_run

    slo_ms = values.slo_ms if values.slo_ms is not None else model.engine.get("tbt_slo_ms")
    slo_s = None if slo_ms is None else slo_ms / 1e3
    print(report(measured, slo_s))
    if values.out is not None:
        folder = Path(values.out).expanduser()
        try:
            written = write_run(measured, folder, about, name=about["name"], tbt_slo_s=slo_s)
        except PlotError as error:
            logging.warning("%s; the tables are in %s", error, folder)
        else:
            print(f"\nwritten to {folder}: {', '.join(path.name for path in written)}")
    return 0


def _here(
    values: flags.FlagValues, spec: WorkloadSpec, model: ModelArguments, documents: str | None
) -> "tuple[Run, dict[str, Any]]":
    """Serves the workload in this process; the run, and what it is of."""
    # Here, so that --help and wrong flags are answered without waiting for jax.
    from sarathi_jax.bench.replay import replay
    from sarathi_jax.llm import LLM

    if model.engine.get("hosts", 1) > 1:
        keep_stdout()
    with LLM(model.model, dtype=model.dtype, progress=sys.stderr.isatty(), **model.engine) as llm:
        cache = llm.cache_config
        workloads = spec.open(min(cache.max_model_len, cache.num_blocks * cache.block_size))
        requests = workloads.at(spec.rate, spec.seed).requests()
        _announce(workloads, requests, repr(llm))
        prompts = None
        if documents is not None:
            texts = _texts(documents, llm.tokenizer, requests, spec.seed)
            assert llm.tokenizer is not None
            prompts = [llm.tokenizer.encode(text) for text in texts]
        measured = replay(
            llm,
            requests,
            prompts=prompts,
            seed=spec.seed,
            limit_s=values.time_limit_s,
            progress=sys.stderr.isatty(),
        )
        settings = dataclasses.asdict(llm.engine_config)
        about = {"name": settings["policy"], "model": repr(llm), **_about(workloads, spec), "engine": settings}
    return measured, about


def _there(
    values: flags.FlagValues, spec: WorkloadSpec, model: ModelArguments, documents: str | None
) -> "tuple[Run, dict[str, Any]]":
    """Has a server serve the workload; the run, and what it is of."""
    try:
        from sarathi_jax.bench.replay_http import replay_url, served_model
    except ImportError:
        raise UsageError("--url needs aiohttp: pip install 'sarathi-jax[bench]'") from None
    served = served_model(values.url, values.api_key, values.served_model)

    # Not before somebody has answered: these take seconds.
    from sarathi_jax.bench.replay import random_prompts
    from sarathi_jax.resources import checkpoint_path
    from sarathi_jax.tokenizer import load_tokenizer
    from sarathi_jax.weights.directory import load_model_config, load_model_yaml

    path = checkpoint_path() if model.model is None else model.model
    is_yaml = path.suffix in (".yaml", ".yml")
    config = load_model_yaml(path) if is_yaml else load_model_config(path)
    workloads = spec.open(served.context or config.max_position)
    requests = workloads.at(spec.rate, spec.seed).requests()
    _announce(workloads, requests, f"{served.name} at {values.url}")
    if documents is None:
        prompts = random_prompts(requests, config.vocab_size, spec.seed)
    else:
        prompts = _texts(documents, None if is_yaml else load_tokenizer(path), requests, spec.seed)
    measured = replay_url(
        values.url,
        requests,
        prompts,
        model=served.name,
        api_key=values.api_key,
        limit_s=values.time_limit_s,
        progress=sys.stderr.isatty(),
    )
    return measured, {"name": served.name, "url": values.url, **_about(workloads, spec)}


def _announce(workloads: Workloads, requests: Sequence[TimedRequest], who: str) -> None:
    print(f"{len(requests)} requests, {workloads.source}", file=sys.stderr)
    print(f"served by {who}", file=sys.stderr)


def _texts(documents: str, tokenizer: "Tokenizer | None", requests: Sequence[TimedRequest], seed: int) -> list[str]:
    if tokenizer is None:
        raise UsageError("--texts needs a model with a tokenizer: name its folder with --model")
    prompts = text_prompts(documents, tokenizer, [request.prompt for request in requests], seed)
    return [prompt.text for prompt in prompts]


def _about(workloads: Workloads, spec: WorkloadSpec) -> dict[str, Any]:
    """What was run, for whoever finds the results."""
    asked = {"lengths": workloads.source, "arrivals": spec.arrivals, "rate": spec.rate, "seed": spec.seed}
    return {**asked, "number": workloads.number}
