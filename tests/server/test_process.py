"""A server as its operator sees it: a process, its signals, its end, and clients that mean no good."""

import concurrent.futures
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import openai
import pytest

from tests.server.processes import REPO, Process, serve, started

pytestmark = pytest.mark.slow

PROMPT = "the quick brown fox"


def ticks(client: openai.OpenAI, stop: concurrent.futures.Future) -> list[float]:
    """Times between chunks of streams, one after another, until told to stop."""
    gaps = []
    while not stop.done():
        last = None
        for _ in client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=50, stream=True, extra_body={"ignore_eos": True}
        ):
            if last is not None:
                gaps.append(time.monotonic() - last)
            last = time.monotonic()
    return gaps


def test_hostile_clients_are_refused_while_others_stream(server, client):
    stop = concurrent.futures.Future()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        gaps = pool.submit(ticks, client, stop)
        try:
            slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
            began_s = time.monotonic()
            for i, connection in enumerate(slow):
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"[: 5 + i])
            bodies = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n"
            for connection in bodies:
                connection.sendall(head + b"Content-Length: 9\r\n\r\n{")
            endless = socket.create_connection(("127.0.0.1", server.port))
            endless.settimeout(5)
            with pytest.raises(OSError):
                endless.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 10_000_000)
            large_s = time.monotonic()
            answer = httpx.post(
                f"{server.url}/v1/completions",
                content=b" " * 100_000_000,
                headers={"authorization": "Bearer key", "content-type": "application/json"},
                timeout=30,
            )
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"
            assert time.monotonic() - large_s < 8
            for connection in slow:
                connection.settimeout(20)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""
            for connection in bodies:
                connection.settimeout(20)
                assert b" 408 " in connection.recv(1000)
            assert time.monotonic() - began_s < 20
        finally:
            stop.set_result(None)
        assert max(gaps.result()) < 5
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_clients_that_leave_are_forgotten(server, client):
    for _ in range(5):
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model="tiny", prompt=PROMPT, max_tokens=400, extra_body={"ignore_eos": True}
        )
    ends_s = time.monotonic() + 10
    while len([line for line in server.log_lines() if line.get("client") == "gone" or line.get("status") == 499]) < 6:
        assert time.monotonic() < ends_s
        time.sleep(0.1)


def ask_raw(server: Process, request_id: str, window_bytes: int, **options: Any) -> socket.socket:
    """A long stream on a socket that takes in little at once."""
    body = {"model": "tiny", "prompt": PROMPT, "n": 8, "ignore_eos": True, "logprobs": 20, "stream": True}
    text = json.dumps(body | options)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nX-Request-Id: {request_id}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall((head + text).encode())
    return connection


def test_a_client_that_does_not_read_is_cut_off(server, client):
    """Its connection is closed and its samples end, while others stream on."""
    stop = concurrent.futures.Future()
    with ask_raw(server, "deaf", 4096, max_tokens=480) as deaf, concurrent.futures.ThreadPoolExecutor(1) as pool:
        gaps = pool.submit(ticks, client, stop)
        try:
            ends_s = time.monotonic() + 30
            while not (told := [line for line in server.log_lines() if line.get("request_id") == "deaf"]):
                assert time.monotonic() < ends_s
                time.sleep(0.1)
        finally:
            stop.set_result(None)
        assert told[0]["client"] == "gone"
        assert told[0]["output_tokens"] < 8 * 480
        assert max(gaps.result()) < 5
        deaf.settimeout(5)
        read = b""
        with contextlib.suppress(ConnectionResetError):
            while part := deaf.recv(1 << 16):
                read += part
        assert b"[DONE]" not in read


def test_a_slow_reader_gets_everything(server):
    """Although it takes longer than a client may take in nothing."""
    ends_s, read = time.monotonic() + 3, b""
    with ask_raw(server, "slow", 1 << 16, max_tokens=200) as slow:
        slow.settimeout(10)
        while time.monotonic() < ends_s:
            read += slow.recv(1 << 14)
            time.sleep(0.1)
        assert b"[DONE]" not in read
        while b"[DONE]" not in read:
            part = slow.recv(1 << 16)
            assert part
            read += part


def test_a_termination_under_load_loses_nothing(tiny):
    with started(serve(tiny.llm._path, "--drain_timeout_s=60")) as server:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 450, "ignore_eos": True, "temperature": 0}

        def ask(i: int) -> str:
            answer = httpx.post(f"{server.url}/v1/completions", json=body | {"stream": i % 2 == 0}, timeout=60)
            assert answer.status_code == 200, answer.text
            if i % 2:
                return answer.json()["choices"][0]["text"]
            assert answer.text.endswith("data: [DONE]\n\n")
            chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            return "".join(chunk["choices"][0]["text"] for chunk in chunks)

        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            asked = [pool.submit(ask, i) for i in range(40)]
            while httpx.get(f"{server.url}/live").json().get("running", 0) < 4:
                time.sleep(0.01)
            time.sleep(0.3)  # for the last of them to arrive
            server.signal()
            while httpx.get(f"{server.url}/ready").status_code == 200:
                time.sleep(0.01)
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 503
            texts = [future.result() for future in asked]
        assert len(set(texts)) == 1
        assert server.wait() == 0
        (drain,) = [line for line in server.log_lines() if line["message"] == "draining"]
        assert drain["samples"] > 0


FAILING = """
import logging, sys, types
from sarathi_jax.server.config import ServerConfig
from sarathi_jax.server.logs import use_json_logs
from sarathi_jax.server.run import bind, serve
from sarathi_jax.request import Request
from pathlib import Path
import time

class Engine:
    has_work = False
    def add_request(self, request_id, ids, params, **more):
        self.has_work = True
        return Request(request_id, tuple(ids), params, 5, 0, frozenset(), 0.0)
    def abort(self, request_id):
        return None
    def step(self):
        {step}

use_json_logs()
model = types.SimpleNamespace(vocab_size=100, eos_token_ids=())
loaded = types.SimpleNamespace(
    path=Path("tiny"), model_config=model, tokenizer=None, engine=Engine, close=lambda: None,
    cache_config=types.SimpleNamespace(max_model_len=100),
)
config = ServerConfig(port=0, step_timeout_s=0.5)
sys.exit(serve(loaded, config, bind(config), announce=lambda url: print("serving at " + url, flush=True)))
"""


@pytest.mark.parametrize("step", ["time.sleep(100)", "raise RuntimeError('lost')"])
def test_a_broken_engine_ends_the_process_for_its_supervisor(step):
    with started(["-c", FAILING.replace("{step}", step)]) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": [5]}, timeout=20)
        assert answer.status_code == 503
        assert server.wait(20) == 70


def test_a_second_signal_ends_at_once():
    code = FAILING.replace("{step}", "time.sleep(0.01); return []").replace("step_timeout_s=0.5", "")
    with started(["-c", code]) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            call = pool.submit(httpx.post, f"{server.url}/v1/completions", json={"model": "tiny", "prompt": [5]})
            time.sleep(0.5)
            server.signal(signal.SIGINT)
            time.sleep(0.5)
            server.signal(signal.SIGTERM)
            assert server.wait(10) == 128 + signal.SIGTERM
            assert isinstance(call.exception(), httpx.TransportError)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port=70000"], "port=70000"),
        (["--prot=1"], "mean: port"),
        (["--step_timeout_s=0"], "step_timeout_s"),
        (["--config=/nowhere.yaml"], "cannot read"),
        (["--model=/nowhere"], "/nowhere"),
        (["--host=203.0.113.1"], "cannot listen"),
    ],
)
def test_what_cannot_start_says_why(flags, words):
    done = subprocess.run([sys.executable, "main.py", "serve", *flags], cwd=REPO, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
