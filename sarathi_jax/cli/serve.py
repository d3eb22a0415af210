"""Serves a model over HTTP with an API like OpenAI's.

The small model that ships, on port 8000 of this machine:
  PROGRAM serve
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "austen", "prompt": "The old house", "max_tokens": 40}'

A model of your own, for other machines, with a key and a name:
  PROGRAM serve --model ~/models/qwen3-0.6b --host 0.0.0.0 --served_model_name qwen --flagfile keys.txt

Everything in a file; flags beside it go before what it says:
  PROGRAM serve --config server.yaml --port 9000
where server.yaml holds flags as keys, such as
  {model: /models/llama2-7b, tp: 2, max_num_seqs: 64, api_key: [first, second]}

SIGTERM lets running requests finish and refuses new ones; a second one ends the server at once. Status 0: it was asked
to end. 70: its engine failed, start it anew. 1, 2: it could not start, the last line says why.
"""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sarathi_jax.cli.fields import UsageError, define_fields, given_fields
from sarathi_jax.cli.model_flags import define_model_flags, model_arguments
from sarathi_jax.cli.streams import keep_stdout
from sarathi_jax.config import ConfigError, read_yaml
from sarathi_jax.server.config import ServerConfig

SUMMARY = "serves a model over HTTP"

_OF_THE_COMMAND_LINE = ("config", "help", "v")


def define(values: flags.FlagValues) -> None:
    """Defines the flags: the server's, then the model's."""
    flags.DEFINE_string("config", None, "YAML file with flags as keys.", flag_values=values)
    define_fields(values, ServerConfig)
    define_model_flags(values)


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Serves; returns the exit status."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; everything is given by flags")
    if values.config is not None:
        _read_config(values, Path(values.config).expanduser())
    model = model_arguments(values)
    try:
        config = ServerConfig(**given_fields(values, ServerConfig))
    except ConfigError as error:
        raise UsageError(str(error)) from None
    # Here, so that --help and wrong flags are answered without waiting for jax.
    from sarathi_jax.loading import load
    from sarathi_jax.server.logs import use_json_logs
    from sarathi_jax.server.page import page_router
    from sarathi_jax.server.run import bind, serve
    from sarathi_jax.server.watch import watch

    use_json_logs()
    several = model.engine.get("hosts", 1) > 1
    if several:
        keep_stdout()
    # Of several processes the first listens alone, and which one that is turns out while they meet.
    taken = None if several else bind(config)
    loaded = load(model.model, model.dtype, sys.stderr.isatty(), model.engine, timed=True)
    start_up = loaded.start_up
    print(f"{start_up.num_programs} programs ready in {start_up.compile_s:.1f} s", file=sys.stderr)

    name = config.served_model_name[0] if config.served_model_name else loaded.path.resolve().name
    watching = watch(loaded, name, config.max_waiting, config.trace_path)

    def announce(url: str) -> None:
        print(f"serving at {url}", flush=True)

    try:
        return serve(
            loaded,
            config,
            taken or bind(config),
            announce=announce,
            admit=watching.admission,
            metrics=watching.metrics.text,
            refused=watching.refused,
            routers=[page_router(watching.view)],
        )
    finally:
        watching.close()


def _read_config(values: flags.FlagValues, path: Path) -> None:
    """Takes the flags of a file, except those that the command line has."""
    try:
        fields = read_yaml(path)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    known = [name for name in values if name not in _OF_THE_COMMAND_LINE]
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; do you mean {near[0]}?" if near else ""
            raise UsageError(f"{path}: unknown key {name!r}{hint}")
        flag = values[name]
        if not flag.present:
            _set(flag, value, path)


def _set(flag: flags.Flag, value: Any, path: Path) -> None:
    try:
        flag.parse(value)
    except (flags.IllegalFlagValueError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: {flag.name}: {error}") from None
    flag.present += 1
