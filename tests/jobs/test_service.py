"""Batch jobs end to end: a real engine, and the real command killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny_models import write_tiny_model
from tests.tiny_tokenizers import VOCAB_SIZE, write_tiny_tokenizer

ENGINE = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 4, "token_buckets": (16,), "block_size": 8}
NUM_ROWS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model("llama2", folder, changes={"vocab_size": VOCAB_SIZE})
    return write_tiny_tokenizer(folder)


@pytest.fixture
def files(tmp_path):
    rows = [{"id": i, "prompt": f"the quick brown fox {i}"} for i in range(NUM_ROWS)]
    rows[3] = {"id": 3, "prompt_token_ids": [5, 6, 7]}
    rows[4] = {"id": 4, "messages": [{"role": "user", "content": "the dog"}]}
    rows[5] = {"id": 5, "messages": [{"nonsense": 1}]}
    rows[6] = {"id": 6, "prompt": "the " * 500}
    rows[7] = {"id": 7, "prompt_token_ids": [VOCAB_SIZE + 1]}
    rows[8] = {"id": 8, "prompt": "the lazy dog \ud800"}
    rows[9] = {"id": 9, "prompt": ""}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def check(path):
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert sorted(rows) == list(range(NUM_ROWS))
    assert sorted(i for i in rows if "error" in rows[i]) == [6, 7, 8, 9]
    assert "500" not in rows[6]["error"]
    for i, row in rows.items():
        assert row["line"] == i + 1
        if "error" not in row:
            assert len(row["outputs"][0]["token_ids"]) == 6
    assert rows[4]["prompt_token_ids"][0] == 1
    return rows


@pytest.mark.slow
def test_rows_of_every_kind(model, files):
    from sarathi_jax.jobs.batch import run_job
    from sarathi_jax.jobs.service import LLMService
    from sarathi_jax.llm import LLM

    params = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    with LLM(model, progress=False, **ENGINE) as llm:
        run_job(LLMService(llm), *files, params, max_pending=8, progress=False)
        rows = check(files[1])
        assert not llm.engine.has_work
        alone = llm.generate(rows[0]["prompt"], use_tqdm=False, sampling_params=None)
        assert alone[0].prompt_token_ids == tuple(rows[0]["prompt_token_ids"])


@pytest.mark.slow
def test_the_command_survives_kill_9(model, files, repo):
    engine = [f"--{name}={value}" for name, value in (ENGINE | {"token_buckets": 16}).items()]
    sampling = ["--max_tokens=6", "--temperature=0", "--ignore_eos"]
    job = ["--model", str(model), "--input", str(files[0]), "--output", str(files[1])]
    command = [sys.executable, str(repo / "main.py"), "generate", *job, *engine, *sampling]
    kills = 0
    for _ in range(10):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        while process.poll() is None:
            if not kills and files[1].exists() and files[1].stat().st_size > 3000:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.001)
        assert process.stderr is not None
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        kills += 1
    assert process.returncode == 0
    assert kills == 1
    check(files[1])
