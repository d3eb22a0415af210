"""The processes of a replica: what they tell each other, and that none outlives the others."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from sarathi_jax.parallel import hosts as hosts_module
from sarathi_jax.parallel.hosts import LOST_EXIT_CODE, Hosts, HostsError

KEY = bytes(range(32))

# What a process does after joining, by name. Standard output tells the test how far it has come.
SCRIPT = """
import sys, threading, time
import jax, numpy as np
from sarathi_jax.parallel import hosts as module

act, num, index, coordinator = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def say(text):
    print(text, flush=True)

def collective():
    # The first process comes here alone: its sum is never complete.
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("x"))
    ones = jax.make_array_from_callback((jax.device_count(),), rows, lambda where: np.ones(1, np.float32))
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P()))
    return float(total(ones)[0])

if act == "late":
    jax.devices()
if act == "alone":
    module._START_S = 3
hosts = module.join(num, index, coordinator)
if act == "differ":
    hosts.agree({"tp": 2, "token_budget": 512 if index < 2 else 256})
hosts.agree({"tp": 2})
if act in ("serve", "forget"):
    say(f"sum {collective():g}, minimum {hosts.minimum(7 - index)}")
    if hosts.is_leader:
        hosts.broadcast({"step": np.asarray(5)})
        say(f"results {sorted(int(hosts.next_result()['result']) for _ in range(num - 1))}")
        if act == "serve":
            start = time.monotonic()
            hosts.close()
            say("closed" if time.monotonic() - start < 5 else "closed late")
    else:
        while (message := hosts.receive()) is not None:
            hosts.send({"result": message["step"] * 10 + index})
        say("over")
    sys.exit()
say("ready")
if act == "raise" and index == 1:
    raise ValueError("the follower's own trouble")
if act == "stuck":
    threading.Event().wait()
if act == "collective" and index != int(sys.argv[5]):
    collective()
hosts.next_result() if hosts.is_leader else hosts.receive()
"""


class Processes:
    """Processes of one replica on loopback."""

    def __init__(self, act: str, num: int, *args: object, run: int | None = None):
        with socket.create_server(("127.0.0.1", 0)) as server:
            coordinator = f"127.0.0.1:{server.getsockname()[1]}"
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, act, str(num), str(index), coordinator, *map(str, args)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            )
            for index in range(num if run is None else run)
        ]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_ready(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == "ready\n", process.communicate()[1]

    def end(self, index: int, timeout: float = 60) -> tuple[int, list[str], str]:
        """Exit status, lines and errors of a process; fails if it does not end in time."""
        out, err = self.processes[index].communicate(timeout=timeout)
        said = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        return self.processes[index].returncode, said, err


def connect(num: int, strangers: bool = False) -> list[Hosts]:
    """All processes of a replica as objects of this one, without JAX between them."""
    with hosts_module._listen("127.0.0.1") as listener, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", listener.getsockname()[1])
        if strangers:
            silent, rude, impostor = (stack.enter_context(socket.create_connection(address)) for _ in range(3))
            silent.sendall(b"GET")
            rude.sendall(b"\xff" * 10_000)
            impostor.sendall(hosts_module._GREETING.pack(KEY[::-1], 1))
        with ThreadPoolExecutor(num) as pool:
            followers = [
                pool.submit(lambda i=i: Hosts(i, num, {0: hosts_module._connect(address, KEY, i)}))
                for i in range(1, num)
            ]
            leader = Hosts(0, num, hosts_module._accept(listener, KEY, num))
            return [leader, *(follower.result() for follower in followers)]


def everywhere(processes: list[Hosts], call) -> list:
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(call, processes))


def test_messages(monkeypatch):
    """In order, of every dtype and shape that a step needs, in both directions, in spite of strangers at the door."""
    monkeypatch.setattr(hosts_module, "_GREETING_S", 0.2)
    leader, *followers = connect(3, strangers=True)
    sent = [
        {"bucket": np.asarray(64), "buffer": np.arange(i, dtype=np.int32), "rows": np.ones((2, i), np.bool_)}
        for i in range(200)
    ]
    sent += [{}, {"t": np.asarray(0.7, np.float32), "w": np.full((3, 2), 1.5, ml_dtypes.bfloat16)}]
    for message in sent:
        leader.broadcast(message)
    for follower in followers:
        for message in sent:
            received = follower.receive()
            assert received is not None
            assert received.keys() == message.keys()
            for name, array in message.items():
                assert received[name].dtype == array.dtype
                np.testing.assert_array_equal(received[name], array)
                assert received[name].flags.writeable
    for i in range(10):
        followers[1].send({"tokens": np.asarray([i])})
    assert [int(leader.next_result()["tokens"][0]) for _ in range(10)] == list(range(10))

    leader.close()
    leader.close()
    for follower in followers:
        assert follower.receive() is follower.receive() is None
        follower.send({})  # a late result, which nobody wants any more
        follower.close()
    with pytest.raises(HostsError, match="this replica is closed"):
        leader.broadcast({})
    with pytest.raises(HostsError, match="this replica is closed"):
        leader.next_result()


def test_agreement():
    processes = connect(3)
    assert everywhere(processes, lambda hosts: hosts.minimum(10 - hosts.index)) == [8, 8, 8]
    everywhere(processes, lambda hosts: hosts.agree({"tp": 2, "dtype": "float32"}))

    def refusal(hosts: Hosts) -> str:
        with pytest.raises(HostsError) as caught:
            hosts.agree({"tp": 2} if hosts.index < 2 else {"tp": 2, "dtype": "bfloat16"})
        return str(caught.value)

    (text,) = set(everywhere(processes, refusal))
    everywhere(processes, Hosts.close)
    name = socket.gethostname()
    assert text.startswith(f"dtype is not set on process 0 ({name}) but bfloat16 on process 2 ({name}): start all")


@pytest.mark.slow
@pytest.mark.parametrize("act", ["serve", "forget"])
def test_orderly_end(act: str):
    """With `close` and, for the script that forgets it, without: status 0 everywhere, at once and without a word."""
    with Processes(act, 3) as replica:
        ends = [replica.end(index) for index in range(3)]
    assert [status for status, _, _ in ends] == [0, 0, 0], ends
    assert ends[0][1] == ["sum 3, minimum 5", "results [51, 52]"] + ["closed"] * (act == "serve")
    assert ends[1][1] == ends[2][1] == ["sum 3, minimum 5", "over"]
    assert not any("sarathi_jax" in err for _, _, err in ends)


@pytest.mark.slow
def test_refused_starts():
    """A configuration of its own is refused on all sides; so is joining too late, or waiting for who never comes."""
    with Processes("differ", 3) as differing, Processes("late", 1) as late, Processes("alone", 2, run=1) as alone:
        ends = [differing.end(index) for index in range(3)]
        late_end, alone_end = late.end(0), alone.end(0)
    for status, _, err in ends:
        assert status == 1
        assert "HostsError: token_budget is 512 on process 0" in err
        assert "but 256 on process 2" in err
        assert "is lost" not in err
    assert late_end[0] == 1
    assert "join before JAX touches a device" in late_end[2]
    assert alone_end[0] == LOST_EXIT_CODE
    assert "process 0 of 2, coordinator 127.0.0.1:" in alone_end[2]
    assert "not all processes were there after 3 s" in alone_end[2]


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("act", ["wait", "stuck", "collective"])
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process(act: str, victim: int):
    with Processes(act, 2, victim) as replica:
        replica.wait_ready()
        replica.processes[victim].kill()
        start = time.monotonic()
        status, _, err = replica.end(1 - victim)
    assert time.monotonic() - start < 10
    assert f"process {1 - victim} ({socket.gethostname()}): process {victim} ({socket.gethostname()}) is lost" in err
    assert "start all its processes again" in err
    # JAX aborts a follower in the same moment, and may be the faster one.
    assert status in ((LOST_EXIT_CODE, -signal.SIGABRT) if victim == 0 else (LOST_EXIT_CODE,)), err


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_process(victim: int):
    with Processes("collective", 2, victim) as replica:
        replica.wait_ready()
        replica.processes[victim].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        status, _, err = replica.end(1 - victim)
    assert time.monotonic() - start < 30
    assert f"process {victim} ({socket.gethostname()}) is lost (no sign of life for 15 s)" in err
    assert status == LOST_EXIT_CODE, err


@pytest.mark.slow
@pytest.mark.parallel
def test_failed_follower():
    """Ends with its own traceback; the leader and the other follower end, too, and name it."""
    with Processes("raise", 3) as replica:
        replica.wait_ready()
        start = time.monotonic()
        ends = [replica.end(index) for index in range(3)]
    assert time.monotonic() - start < 10
    assert "the follower's own trouble" in ends[1][2]
    for index in (0, 2):
        assert f"process 1 ({socket.gethostname()}) is lost (its connection broke)" in ends[index][2]
    assert "HostsError: process 1" in ends[0][2]
    assert all(status != 0 for status, _, _ in ends)
