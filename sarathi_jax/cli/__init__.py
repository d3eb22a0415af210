"""The command line: verb -> absl flags -> config -> what the library does. Text goes to stdout, all else to stderr."""

import logging
import os
import sys
import traceback
from types import ModuleType

from absl import flags

from sarathi_jax.cli import (
    bench,
    calibrate,
    capacity,
    convert,
    generate,
    models,
    plan,
    profile,
    serve,
    simulate,
    train,
)
from sarathi_jax.cli.fields import UsageError, describe, parse

VERBS: dict[str, ModuleType] = {
    "generate": generate,
    "serve": serve,
    "bench": bench,
    "profile": profile,
    "calibrate": calibrate,
    "simulate": simulate,
    "capacity": capacity,
    "plan": plan,
    "models": models,
    "convert": convert,
    "train": train,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: program and arguments; None: those of the process.

    Returns:
      Exit status: 0 done, 1 failed, 2 a command line that makes no sense, 130 interrupted.
    """
    program, *arguments = sys.argv if argv is None else argv
    program = f"python {program}" if program.endswith(".py") else os.path.basename(program)
    try:
        return _run(program, arguments)
    except UsageError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if logging.getLogger().isEnabledFor(logging.INFO):
            traceback.print_exc()
        if isinstance(error, OSError) and error.filename:
            return _fail(f"{error.filename}: {error.strerror}", 1)
        # The project's own errors say what the user can put right.
        if isinstance(error, OSError) or type(error).__module__.startswith("sarathi_jax."):
            return _fail(str(error), 1)
        return _fail(f"unexpected {type(error).__name__}: {error} (--v=1 shows where)", 1)


def _run(program: str, arguments: list[str]) -> int:
    if not arguments or arguments in (["--help"], ["-h"], ["-help"]):
        print(_usage(program), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    verb, *arguments = arguments
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}; there are {', '.join(VERBS)}; see {program} --help")
    module = VERBS[verb]
    values = flags.FlagValues()
    module.define(values)
    flags.DEFINE_integer("v", 0, "1 adds log lines, and tracebacks of errors, on stderr.", flag_values=values)
    flags.DEFINE_boolean("help", False, "explains this command.", short_name="h", flag_values=values)
    positional = parse(values, f"{program} {verb}", arguments)
    if values.help:
        print(f"{(module.__doc__ or '').strip().replace('PROGRAM', program)}\n\nFlags:\n{describe(values)}")
        return 0
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level="INFO" if values.v > 0 else "WARNING")
    return module.run(values, positional)


def _fail(text: str, status: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status


def _usage(program: str) -> str:
    verbs = "\n".join(f"  {name:<10}{module.SUMMARY}" for name, module in VERBS.items())
    return f"""Serves and trains language models in JAX.

Usage: {program} VERB [--flag=value ...]

Verbs:
{verbs}

Examples:
  {program} generate --prompt "The old house"
  {program} generate --input prompts.jsonl --output texts.jsonl
  {program} serve
  {program} models

{program} VERB --help explains a verb and its flags."""
