"""The command line, with a scripted model in place of a real one; tests/jobs holds the batch jobs' own tests."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sarathi_jax.cli import main
from sarathi_jax.config import EngineConfig
from sarathi_jax.request import (
    CompletionOutput,
    RequestError,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from sarathi_jax.resources import config_path

REPO = Path(__file__).resolve().parent.parent
PIECES = (" and", " it", " was", " so")


class ScriptedLLM:
    """Continues every text with the same four words."""

    made = None
    start_up = types.SimpleNamespace(num_programs=3, compile_s=0.5)

    def __init__(self, model=None, *, dtype="auto", progress=True, **engine):
        self.model, self.dtype, self.engine = model, dtype, EngineConfig(**engine)
        ScriptedLLM.made = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def output(self, prompt, params, length):
        if prompt == "":
            raise RequestError("the prompt is empty")
        is_text = isinstance(prompt, str)
        samples = tuple(
            CompletionOutput(i, "".join(PIECES[:length]) if is_text else "", tuple(range(length)), None, "length")
            for i in range(params.n)
        )
        text, ids = (prompt, (1,)) if is_text else (None, tuple(prompt))
        return RequestOutput("0", text, ids, samples, length == len(PIECES), RequestMetrics(0.0))

    def generate(self, prompts, params, *, use_tqdm=True):
        self.params = params
        return [self.output(prompt, params, len(PIECES)) for prompt in prompts]

    def stream(self, prompt, params):
        self.params = params
        for length in range(1, len(PIECES) + 1):
            yield self.output(prompt, params, length)


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setitem(sys.modules, "sarathi_jax.llm", types.SimpleNamespace(LLM=ScriptedLLM))
    return ScriptedLLM


def run(*arguments):
    return main(["sarathi-jax", *arguments])


def test_text_streams_after_its_prompt(scripted, capsys):
    assert run("generate", "--prompt", "Once", "--temperature=0") == 0
    assert capsys.readouterr().out == "Once and it was so\n"
    assert scripted.made.model is None
    assert scripted.made.params == SamplingParams(max_tokens=128, temperature=0.0)


def test_flags_reach_the_engine_and_the_request(scripted):
    arguments = "--model m --dtype float32 --token_budget 64 --nooverlap --token_buckets 8,64 --max_tokens none"
    more = "--stop a --stop b --stop_token_ids 5,6 --logit_bias 7:-1.5,8:2 --seed 3 --n 2 --ignore_eos --logprobs 0"
    assert run("generate", "--prompt", "Once", *arguments.split(), *more.split()) == 0
    assert scripted.made.model == Path("m")
    assert scripted.made.dtype == "float32"
    assert scripted.made.engine == EngineConfig(token_budget=64, overlap=False, token_buckets=(8, 64))
    assert scripted.made.params == SamplingParams(
        max_tokens=None,
        stop=("a", "b"),
        stop_token_ids=(5, 6),
        logit_bias={7: -1.5, 8: 2.0},
        seed=3,
        n=2,
        ignore_eos=True,
        logprobs=0,
    )


def test_the_form_of_a_text_is_given_as_json(scripted):
    assert run("generate", "--prompt=Once", '--structured_outputs={"json": {"enum": ["a"]}}') == 0
    assert scripted.made.params.structured_outputs == StructuredOutputsParams(json={"enum": ["a"]})


def test_flags_go_before_a_deployment(scripted, monkeypatch):
    assert run("generate", "--prompt=x", "--deployment=llama2-70b-8xa40", "--tp=8", "--max_num_seqs=4") == 0
    made = scripted.made
    assert (made.model, made.dtype) == (config_path("models", "llama2-70b"), "bfloat16")
    assert made.engine == EngineConfig(tp=8, pp=2, max_num_seqs=4)
    monkeypatch.setattr("sarathi_jax.cli.generate.keep_stdout", lambda: None)
    several = ["--deployment=falcon-180b-2x4xa100", "--model=mine", "--dtype=float32", "--pp_layers=41,39"]
    assert run("generate", "--prompt=x", *several, "--host_id=1", "--coordinator=first:1234") == 0
    made = scripted.made
    assert (made.model, made.dtype) == (Path("mine"), "float32")
    mesh = {"tp": 4, "pp": 2, "pp_layers": (41, 39), "hosts": 2, "host_id": 1, "coordinator": "first:1234"}
    assert made.engine == EngineConfig(max_num_seqs=128, **mesh)


def test_the_prompt_can_come_from_a_file_or_a_pipe(scripted, capsys, monkeypatch, tmp_path):
    (tmp_path / "prompt.txt").write_text("From a\nfile\n")
    assert run("generate", "--prompt_file", str(tmp_path / "prompt.txt")) == 0
    assert capsys.readouterr().out == "From a\nfile and it was so\n"
    monkeypatch.setattr(sys, "stdin", (tmp_path / "prompt.txt").open())
    assert run("generate") == 0
    assert capsys.readouterr().out == "From a\nfile and it was so\n"


def test_json_prints_one_object_a_request(scripted, capsys):
    assert run("generate", "--json", "--prompt", "a", "--prompt", "b", "--prompt_token_ids", "4,5") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b", None]
    assert rows[0]["outputs"][0]["text"] == " and it was so"
    assert rows[2]["prompt_token_ids"] == [4, 5]


def test_several_samples_are_set_apart_and_token_ids_answered_with_ids(scripted, capsys):
    assert run("generate", "--prompt", "a", "--n", "2") == 0
    assert capsys.readouterr().out.count("a and it was so") == 2
    assert run("generate", "--prompt_token_ids", "4,5") == 0
    assert capsys.readouterr().out == "0,1,2,3\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Usage:"),
        ("generat", "unknown verb 'generat'"),
        ("generate --max_token 5", "Did you mean: max_tokens"),
        ("generate --prompt a --n x", "--n=x"),
        ("generate --prompt a --temperature -1", "temperature=-1"),
        ("generate --prompt a --top_p nan", "top_p=nan"),
        ("generate --prompt a --dtype int3", "float32|bfloat16"),
        ("generate --prompt a --token_budget 0", "token_budget=0"),
        ("generate --prompt a --logit_bias 5", "5:-100,17:2.5"),
        ("generate --prompt a --structured_outputs {", "is not JSON"),
        ("generate --prompt a --structured_outputs 5", "is not a JSON object"),
        ("generate --prompt a --structured_outputs {}", "structured_outputs needs exactly one of json"),
        ("generate --prompt_token_ids a", "5,17,23"),
        ("generate a", "--prompt 'a'"),
        ("generate --input a", "--output is missing"),
        ("generate --input a --output b --prompt c", "cannot go together"),
        ("models a", "unexpected 'a'"),
        ("convert a b", "convert SOURCE TARGET --format"),
        ("convert a b --format x", "hf|orbax"),
        ("train", "--corpus is missing"),
        ("train --corpus a --out b --phases 3", "STEPSxLENGTHxBATCH"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_clear_line(capsys, arguments, message):
    assert run(*arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1 or message == "Usage:"


def test_what_fails_later_is_one_line_too_and_a_traceback_on_demand(scripted, capsys):
    assert run("generate", "--prompt", "") == 1
    assert capsys.readouterr().err.splitlines() == ["3 programs ready in 0.5 s", "error: the prompt is empty"]
    assert run("generate", "--prompt_file", "/nowhere/at/all") == 1
    assert capsys.readouterr().err == "error: /nowhere/at/all: No such file or directory\n"


def test_an_unexpected_error_names_its_type(scripted, capsys, monkeypatch):
    monkeypatch.setattr(ScriptedLLM, "stream", lambda *_: 1 / 0)
    assert run("generate", "--prompt", "a") == 1
    error = "error: unexpected ZeroDivisionError: division by zero (--v=1 shows where)\n"
    assert capsys.readouterr().err.endswith(error)


@pytest.mark.parametrize("verb", ["generate", "models", "convert", "train"])
def test_every_verb_explains_itself(capsys, verb):
    assert run(verb, "--help") == 0
    out = capsys.readouterr().out
    assert f"sarathi-jax {verb}" in out
    assert "PROGRAM" not in out
    assert "None" not in out


def test_every_parameter_has_a_flag_with_help(capsys):
    assert run("generate", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*SamplingParams.__dataclass_fields__, *EngineConfig.__dataclass_fields__):
        at = next(i for i, line in enumerate(lines) if line.startswith((f"  --{name}", f"  --[no]{name}")))
        assert len(lines[at + 1].split()) >= 3, f"--{name} has no help"


def test_models_lists_architectures_and_sizes(capsys):
    assert run("models") == 0
    out = capsys.readouterr().out
    assert "FalconForCausalLM" in out
    row = next(line for line in out.splitlines() if line.startswith("mistral-7b")).split()
    assert row[1:6] == ["mistralai/Mistral-7B-v0.1", "7.24", "B", "14.5", "GB"]


def run_main(*arguments, **options):
    command = [sys.executable, str(REPO / "main.py"), *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300, **options)


def test_the_binary_runs_from_anywhere_and_help_does_not_wait_for_jax():
    result = run_main("generate", "--help")
    assert result.returncode == 0
    assert "python" in result.stdout
    code = (
        "import sys; from sarathi_jax.cli import main; main(['x', 'train', '--help']); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPO).returncode == 0


def test_a_closed_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(REPO / "main.py"), "generate", "--help"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")
