"""Two processes of four virtual devices each serve one model: through `LLM` and main.py, and when one is killed."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.engine.serving import Parity
from tests.parallel.asks import ASKS, MODELS
from tests.tiny_models import write_tiny_model
from tests.tiny_tokenizers import VOCAB_SIZE, write_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.parallel]

CHANGES = MODELS["llama3.1"] | {"num_hidden_layers": 5}


def start(repo: Path, command: Sequence[str]) -> subprocess.Popen:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], cwd=repo, env=environment, stdout=pipe, stderr=pipe, text=True)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def model(tmp_path) -> Path:
    directory = tmp_path / "model"
    write_tiny_model("llama3.1", directory, changes={"vocab_size": VOCAB_SIZE} | CHANGES)
    write_tiny_tokenizer(directory)
    return directory


# The stages on different processes; two stages on each; every stage on both.
@pytest.mark.parametrize(("tp", "pp"), [(4, 2), (2, 4), (8, 1)])
def test_same_tokens_through_llm(repo, whole, model, tmp_path, tp: int, pp: int):
    address, file = free_address(), tmp_path / "outputs"
    script = ["-m", "tests.parallel.one_process", str(model)]
    processes = [start(repo, [*script, str(i), address, str(tp), str(pp), str(file)]) for i in range(2)]
    errors = [process.communicate(timeout=110)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    outputs = pickle.loads(file.read_bytes())
    assert sum(output.metrics.num_preemptions for output in outputs) >= 1
    parity = Parity()
    parity.check(outputs, whole("llama3.1", CHANGES).alone(ASKS))
    assert parity.num_excused <= 1


def test_same_tokens_through_main(repo, model):
    """With log-probabilities, which come from the last stage's process; standard output is ours alone."""
    ask = ["--prompt_token_ids", "5,17,23,90,44", "--max_tokens", "12", "--temperature", "0", "--ignore_eos", "--json"]
    command = ["main.py", "generate", "--model", str(model), *ask, "--logprobs", "3", "--prompt_logprobs", "2"]
    command += ["--token_buckets", "8", "--max_model_len", "64"]
    address = free_address()
    mesh = ["--tp", "4", "--pp", "2", "--hosts", "2", "--coordinator", address]
    processes = [start(repo, [*command, *mesh, "--host_id", str(i)]) for i in range(2)]
    texts = [process.communicate(timeout=110) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert texts[1][0] == ""
    alone = start(repo, command)
    expected = json.loads(alone.communicate(timeout=110)[0])
    found = json.loads(texts[0][0])
    assert found["outputs"][0]["token_ids"] == expected["outputs"][0]["token_ids"]
    for ours, theirs in zip(_logprobs(found), _logprobs(expected), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("killed", [0, 1])
def test_killing_one_ends_the_other(repo, model, killed: int):
    address = free_address()
    script = ["-m", "tests.parallel.one_process", str(model)]
    processes = [start(repo, [*script, str(i), address, "4", "2"]) for i in range(2)]
    try:
        stdout = processes[0].stdout
        assert stdout is not None
        while (line := stdout.readline()) and "ready" not in line:  # among what Gloo says
            pass
        assert "ready" in line, processes[0].communicate(timeout=10)
        time.sleep(2)  # in the middle of its steps
        processes[killed].send_signal(signal.SIGKILL)
        start_s = time.monotonic()
        _, errors = processes[1 - killed].communicate(timeout=30)
        assert time.monotonic() - start_s < 30
        assert processes[1 - killed].returncode != 0
        assert f"process {killed}" in errors
        assert "is lost" in errors
        assert "start all its processes again" in errors
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_different_settings_are_refused(repo, model):
    address = free_address()
    command = ["main.py", "generate", "--model", str(model), "--prompt_token_ids", "5", "--hosts", "2", "--tp", "4"]
    own = (["--pp", "2"], ["--pp", "2", "--block_size", "8"])
    processes = [
        start(repo, [*command, "--coordinator", address, "--host_id", str(i), *more]) for i, more in enumerate(own)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "block_size is 32 on process 0" in errors
        assert "but 8 on process 1" in errors


def _logprobs(answer: dict) -> list[float]:
    tables = [*answer["outputs"][0]["logprobs"], *answer["prompt_logprobs"][1:]]
    return [entry["logprob"] for table in tables for entry in table]
