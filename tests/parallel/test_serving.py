"""Two processes serve one replica over HTTP: the first listens, and none is left when the other goes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sarathi_jax.llm import LLM
from sarathi_jax.request import SamplingParams
from tests.server.processes import REPO, START_S, serve
from tests.tiny_models import write_tiny_model
from tests.tiny_tokenizers import VOCAB_SIZE, write_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.parallel]

DOCUMENT = [5 + i * 7 % 300 for i in range(60)]
# Penalties of a prompt whose blocks the cache has already: the other process must hear of its tokens.
PENALISED = {"presence_penalty": 0.8, "frequency_penalty": 0.6, "repetition_penalty": 1.4}
ASKS: list[dict[str, Any]] = [
    {"prompt": DOCUMENT, "temperature": 0, "max_tokens": 12},
    {"prompt": DOCUMENT, "temperature": 0, "max_tokens": 20, **PENALISED},
    {"prompt": [*DOCUMENT, 9, 11], "temperature": 0.8, "seed": 3, "n": 2, "max_tokens": 10, **PENALISED},
    {"prompt": DOCUMENT[:9], "temperature": 0, "max_tokens": 10, "logit_bias": {"40": 3.0}},
    {"prompt": DOCUMENT[:5], "temperature": 0, "max_tokens": 10, "structured_outputs": {"choice": ["fox", "dog"]}},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hosts") / "model"
    write_tiny_model("llama3.1", directory, changes={"vocab_size": VOCAB_SIZE, "eos_token_id": 2})
    return write_tiny_tokenizer(directory)


@contextlib.contextmanager
def replica(model: Path) -> Iterator[tuple[list[subprocess.Popen[str]], str, Path]]:
    """Both processes, the first one's URL, and the folder with what they say on standard error."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    mesh = ("--tp=2", "--hosts=2", f"--coordinator={coordinator}", "--drain_timeout_s=20")
    environment, processes = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}, []
    try:
        for i in range(2):
            with open(model.parent / f"log{i}", "w") as log:
                command = [sys.executable, *serve(model, *mesh, f"--host_id={i}")]
                processes.append(
                    subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
                )
        began_s, line, stdout = time.monotonic(), "", processes[0].stdout
        assert stdout is not None
        while not line.startswith("serving at "):
            line = stdout.readline()
            assert line, [(model.parent / f"log{i}").read_text() for i in range(2)]
            assert time.monotonic() - began_s < START_S
        yield processes, line.split()[-1], model.parent
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_answers_and_a_termination(model):
    """The same answers as the library alone; then both processes end well, with what runs."""
    with replica(model) as (processes, url, logs):
        answers = [httpx.post(f"{url}/v1/completions", json={"model": "tiny", **ask}, timeout=60) for ask in ASKS]
        assert [answer.status_code for answer in answers] == [200] * len(ASKS), [a.text for a in answers]
        assert answers[1].json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48
        assert "sarathi_late_compiles 0.0" in httpx.get(f"{url}/metrics").text.splitlines()
        body = {"model": "tiny", "prompt": DOCUMENT, "max_tokens": 100, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            processes[0].send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert [process.wait(40) for process in processes] == [0, 0], (logs / "log0").read_text()
        assert processes[1].stdout is not None
        assert processes[1].stdout.read() == ""
    sizes = {"max_model_len": 512, "max_num_seqs": 8, "token_buckets": (16, 64), "block_size": 8, "num_blocks": 256}
    with LLM(model, progress=False, **sizes) as llm:
        for ask, answer in zip(ASKS, answers, strict=True):
            fields = {name: value for name, value in ask.items() if name != "prompt"}
            if "logit_bias" in fields:
                fields["logit_bias"] = {40: 3.0}
            expected = llm.generate(ask["prompt"], SamplingParams(**fields), use_tqdm=False)[0].outputs
            assert [choice["text"] for choice in answer.json()["choices"]] == [sample.text for sample in expected]


def test_the_loss_of_the_other_process_is_a_broken_engine(model):
    """Whoever waits gets 503, and the first process ends with the status that asks for a new start."""
    with replica(model) as (processes, url, logs):
        body = {"model": "tiny", "prompt": DOCUMENT, "max_tokens": 440, "n": 8, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            processes[1].send_signal(signal.SIGKILL)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert processes[0].wait(30) == 70
        assert "process 1" in (logs / "log0").read_text()
