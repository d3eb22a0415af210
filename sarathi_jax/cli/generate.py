"""Writes what comes after a prompt, or answers a file of prompts.

One prompt, from a flag, a file or a pipe; the text streams to stdout as it is made:
  PROGRAM generate --prompt "The old house"
  PROGRAM generate --prompt_file story.txt --max_tokens 400 --temperature 0.7 --top_p 0.95
  echo "She opened the letter" | PROGRAM generate --seed 1 --n 3

Several prompts, served together; one JSON object each with token ids, finish reason and times:
  PROGRAM generate --prompt "The old house" --prompt "She opened the letter" --json

A model of your own: a Hugging Face folder (config.json, *.safetensors, tokenizer) or an Orbax one:
  PROGRAM generate --model ~/models/qwen3-0.6b --dtype bfloat16 --prompt "The capital of France is"

A model over several devices, or several machines, where the same command is started on each:
  PROGRAM generate --model ~/models/llama2-70b --tp 4 --pp 2 --prompt "The capital of France is"
  PROGRAM generate --deployment falcon-180b-2x4xa100 --host_id 0 --coordinator FIRST_MACHINE:1234 --prompt ...

A text of a given form: a JSON schema, a regular expression, one of some words, a grammar:
  PROGRAM generate --prompt "Her name and age:" --structured_outputs '{"json": {"type": "object", "properties":
    {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 120}}}}'
  PROGRAM generate --prompt "Was she happy?" --structured_outputs '{"choice": [" yes", " no"]}'

A batch job. Each input line is a JSON object such as
  {"id": "a", "prompt": "The old house", "sampling_params": {"max_tokens": 20}}
with `prompt`, `prompt_token_ids` or `messages` (a chat); `id` and `sampling_params` may be left out. Each line is
answered by one output line as soon as it is finished; a line that cannot be served gets one with "error".
After a crash or a kill, run the same command again: it does what is missing, nothing twice.
  PROGRAM generate --input prompts.jsonl --output texts.jsonl --max_tokens 100
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sarathi_jax.cli.fields import UsageError, define_fields, given_fields
from sarathi_jax.cli.model_flags import ModelArguments, define_model_flags, model_arguments
from sarathi_jax.cli.streams import keep_stdout
from sarathi_jax.jobs.batch import run_job
from sarathi_jax.jobs.rows import dump, output_fields
from sarathi_jax.request import RequestError, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from sarathi_jax.llm import LLM

SUMMARY = "writes what comes after a prompt, or answers a file of prompts"

Prompt = str | list[int]
_DEFAULTS = {"max_tokens": 128}
_NOT_OF_THE_ENGINE = ("seed",)  # --seed is the request's
_TEXTS = {
    "include_stop_str_in_output": "the stop string that ended the text is part of it.",
    "structured_outputs": "what the text must look like: a JSON object with one of json (a JSON schema), regex, choice "
    "(a list of strings), grammar (Lark) and json_object (true).",
}


def define(values: flags.FlagValues) -> None:
    """Defines the flags: input and output, then every sampling parameter, then every engine parameter."""
    flags.DEFINE_multi_string("prompt", None, "text to continue", flag_values=values)
    flags.DEFINE_string("prompt_file", None, "file whose whole text is the prompt.", flag_values=values)
    flags.DEFINE_string(
        "prompt_token_ids", None, "prompt as token ids with commas between; needs no tokenizer.", flag_values=values
    )
    flags.DEFINE_boolean("json", False, "print one JSON object a request instead of text.", flag_values=values)
    flags.DEFINE_string("input", None, "batch job: file of JSON lines to answer.", flag_values=values)
    flags.DEFINE_string("output", None, "batch job: file of JSON lines to write or go on with.", flag_values=values)
    define_fields(values, SamplingParams, defaults=_DEFAULTS, texts=_TEXTS)
    define_model_flags(values, _NOT_OF_THE_ENGINE)


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Generates; returns the exit status."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; a prompt is given as --prompt {arguments[0]!r}")
    model = model_arguments(values, _NOT_OF_THE_ENGINE)
    sampling = given_fields(values, SamplingParams, always=_DEFAULTS)
    try:  # before the model is loaded
        params = SamplingParams(**sampling)
    except RequestError as error:
        raise UsageError(str(error)) from None
    if values.input or values.output:
        return _run_job(values, model, sampling)
    prompts = _prompts(values)
    with _load(model) as llm:
        if values.json:
            for output in llm.generate(prompts, params, use_tqdm=False):
                print(dump({"id": output.request_id, **output_fields(output)}), flush=True)
        elif len(prompts) == 1 and params.n == 1 and isinstance(prompts[0], str) and params.detokenize:
            _stream(llm, prompts[0], params)
        else:
            _print_all(llm.generate(prompts, params, use_tqdm=sys.stderr.isatty()))
    return 0


def _load(arguments: ModelArguments) -> "LLM":
    # Here, so that --help and wrong flags are answered without waiting for jax.
    from sarathi_jax.llm import LLM

    if arguments.engine.get("hosts", 1) > 1:
        keep_stdout()
    llm = LLM(arguments.model, dtype=arguments.dtype, progress=sys.stderr.isatty(), **arguments.engine)
    start_up = llm.start_up
    print(f"{start_up.num_programs} programs ready in {start_up.compile_s:.1f} s", file=sys.stderr)
    return llm


def _run_job(values: flags.FlagValues, model: ModelArguments, sampling: dict[str, Any]) -> int:
    for name in ("input", "output"):
        if not getattr(values, name):
            raise UsageError(f"a batch job needs both --input and --output; --{name} is missing")
    for name in ("prompt", "prompt_file", "prompt_token_ids", "json"):
        if getattr(values, name):
            raise UsageError(f"--{name} and --input cannot go together")
    source = Path(values.input)
    with open(source, "rb"):  # a missing file is told before the model is loaded
        pass
    with _load(model) as llm:
        from sarathi_jax.jobs.service import LLMService

        summary = run_job(
            LLMService(llm),
            source,
            Path(values.output),
            sampling,
            max_pending=2 * llm.engine_config.max_num_seqs,  # the next ones wait at the door: no step runs half empty
            progress=sys.stderr.isatty(),
        )
    errors = f", {summary.num_errors} of them error rows (first: {summary.first_error})" if summary.num_errors else ""
    written = summary.num_answered + summary.num_errors
    print(f"{written} rows written{errors}; {summary.num_before} were there before", file=sys.stderr)
    return 0


def _prompts(values: flags.FlagValues) -> list[Prompt]:
    """The prompts of the command line, or else of standard input."""
    prompts: list[Prompt] = list(values.prompt or ())
    if values.prompt_file is not None:
        prompts.append(_without_newline(Path(values.prompt_file).read_text(encoding="utf-8")))
    if values.prompt_token_ids is not None:
        try:
            prompts.append([int(item) for item in values.prompt_token_ids.split(",")])
        except ValueError:
            raise UsageError("--prompt_token_ids must be a list like 5,17,23") from None
    if not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError('no prompt: say --prompt "The old house", --prompt_file FILE, or pipe one in')
        prompts.append(_without_newline(sys.stdin.read()))
    return prompts


def _without_newline(text: str) -> str:
    """A file ends with a newline that its writer did not mean as part of the prompt."""
    return text.removesuffix("\n")


def _stream(llm: "LLM", prompt: str, params: SamplingParams) -> None:
    shown = ""
    for output in llm.stream(prompt, params):
        text = prompt + output.outputs[0].text  # the prompt with the first token, not before: it may be refused
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print(flush=True)


def _print_all(outputs: Sequence[RequestOutput]) -> None:
    samples = [(output, sample) for output in outputs for sample in output.outputs]
    for number, (output, sample) in enumerate(samples):
        if number:
            print("\n" + "-" * 40)
        # A model without a tokenizer speaks in token ids.
        has_text = output.prompt is not None or bool(sample.text)
        print(f"{output.prompt or ''}{sample.text}" if has_text else ",".join(map(str, sample.token_ids)))
