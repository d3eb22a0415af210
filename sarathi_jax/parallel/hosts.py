"""The processes that serve one replica together: how they meet, what they tell each other, how they end.

JAX runs one program over the devices of several processes (`jax.distributed`) if all of them enqueue the same programs
in the same order. What to enqueue comes over TCP connections of our own, between the first process (the leader) and
each other one (a follower). They also show which process has ended or got stuck. JAX watches, too, but aborts with a
stack trace, so its watch is only the second line.
"""

import atexit
import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed

from sarathi_jax.parallel.wire import Message, decode, encode, frame, from_text, read_exactly, read_frame, to_text

LOST_EXIT_CODE = 70  # EX_SOFTWARE

# Seconds.
_START_S = 120  # for all processes to come up
_LINK_S = 15.0  # for them to connect, once all are up
_GREETING_S = 2.0  # for one connection to prove itself; the next ones wait meanwhile
_PING_S = 2.0
_SILENCE_S = 15.0
_JAX_SILENCE_S = 25  # more than ours, whose message is the clearer one
_GRACE_S = 5.0  # for the main thread to end by itself after a loss
_SHUTDOWN_S = 20  # for all processes to come to an orderly end

_KEY_BYTES = 32
_GREETING = struct.Struct(f"<{_KEY_BYTES}sI")  # key, index of the follower
_WELCOME = b"\n"
_PING, _MESSAGE, _END, _LOST = b"p", b"m", b"e", b"l"


class HostsError(RuntimeError):
    """The processes of a replica cannot start or go on together; the message says what to do."""


class Hosts:
    """The processes that serve one replica together, as one of them sees the others; `join` makes it.

    When a process is lost, all others end: with a line on stderr, with `HostsError` for whoever waits here, and without
    the main thread's help if it is stuck (in a collective with the lost process, say). All methods raise `HostsError`
    then, and the leader's also once the replica is closed.

    Args:
      index: which process this is; the first (0) leads.
      num: how many there are.
      links: connections by the process at their other end: of the leader to all followers, of a follower to the leader.
    """

    def __init__(self, index: int, num: int, links: Mapping[int, socket.socket]):
        self.index = index
        self.num = num
        self.is_leader = index == 0
        self._links = {peer: (link, threading.Lock()) for peer, link in links.items()}
        self._inbox: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()  # None: nothing more comes
        self._ending = threading.Lock()
        self._over = threading.Event()
        self._loss: str | None = None
        self._names = [""] * num
        for peer, (link, _) in self._links.items():
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.settimeout(_SILENCE_S)
            threading.Thread(target=self._read, args=(peer, link), name=f"hosts-read-{peer}", daemon=True).start()
        threading.Thread(target=self._ping, name="hosts-ping", daemon=True).start()
        self._names = self._exchange(socket.gethostname())

    def broadcast(self, message: Message) -> None:
        """Leader: sends to every follower; returns as soon as the operating system has taken it."""
        framed = frame(_MESSAGE, encode(message))
        for peer in self._links:
            self._send(peer, framed)

    def next_result(self) -> Message:
        """Leader: waits for the next message of any follower, in order of arrival."""
        return self._take()[1]

    def send(self, message: Message) -> None:
        """Follower: sends to the leader; does nothing once that has closed the replica."""
        if self._loss is not None or not self._over.is_set():
            self._send(0, frame(_MESSAGE, encode(message)))

    def receive(self) -> Message | None:
        """Follower: waits for the leader's next message; None once that has closed the replica."""
        item = self._next()
        return None if item is None else item[1]

    def agree(self, settings: Mapping[str, object]) -> None:
        """Checks that all processes were started with the same settings; all of them must call this.

        Args:
          settings: values by name, compared as text.

        Raises:
          HostsError: on every process alike, with the first name whose values differ; the replica is over then.
        """
        each = [json.loads(text) for text in self._exchange(json.dumps({k: str(v) for k, v in settings.items()}))]
        for peer, its in enumerate(each):
            for name in each[0] | its:
                ours, theirs = (values.get(name, "not set") for values in (each[0], its))
                if ours != theirs:
                    self._over.set()
                    raise HostsError(
                        f"{name} is {ours} on {self._who(0)} but {theirs} on {self._who(peer)}: "
                        "start all processes of a replica with the same configuration"
                    )

    def minimum(self, value: int) -> int:
        """The smallest of the values that the processes pass; all of them must call this."""
        return min(map(int, self._exchange(str(value))))

    def meet(self) -> None:
        """Waits until all processes have come here: their first exchange on the devices waits 30 s at most."""
        self._exchange("")

    def close(self) -> None:
        """Ends the replica in order and waits until all processes do so; safe to call twice.

        The leader tells the followers, whose `receive` gives None; they end or close, too. A follower cannot close
        before: it just ends, and is lost to the others.
        """
        with self._ending:
            was_over = self._over.is_set()
            if not was_over and not self.is_leader:
                return
            self._over.set()
        if not was_over:
            self._tell_all(frame(_END), wait=True)
            self._inbox.put(None)
        if self._loss is None:
            # Who stays connected to JAX's service is aborted when another process ends.
            jax.distributed.shutdown()
        for link, _ in self._links.values():
            link.close()

    def abandon(self, why: str) -> None:
        """Takes this process out of a replica that it cannot serve, whose other processes end, too.

        Args:
          why: what they say when they end.
        """
        with self._ending:
            if self._over.is_set():
                return
            self._loss = why
            self._over.set()
        self._tell_all(frame(_LOST, f"{self._who(self.index)} cannot go on: {why}".encode()))
        self._inbox.put(None)

    def _exchange(self, text: str) -> list[str]:
        """What every process passes, in the order of the processes, on all of them."""
        if not self.is_leader:
            self.send({"text": from_text(text)})
            return json.loads(to_text(self._take()[1]["texts"]))
        texts = [text] * self.num
        for _ in self._links:
            peer, message = self._take()
            texts[peer] = to_text(message["text"])
        self.broadcast({"texts": from_text(json.dumps(texts))})
        return texts

    def _take(self) -> tuple[int, Message]:
        item = self._next()
        if item is None:
            raise self._error()
        return item

    def _next(self) -> tuple[int, Message] | None:
        item = self._inbox.get()
        if item is None:
            self._inbox.put(None)  # for whoever asks next
            if self._loss is not None:
                raise self._error()
        return item

    def _send(self, peer: int, framed: bytes) -> None:
        if self._over.is_set():
            raise self._error()
        link, lock = self._links[peer]
        try:
            with lock:
                link.sendall(framed)
        except OSError as error:
            self._lose(peer, error)
            raise self._error() from error

    def _tell_all(self, framed: bytes, wait: bool = False) -> None:
        """Sends to all; `wait`: even where a thread is in the middle of sending, which is a sign of life as well."""
        for link, lock in self._links.values():
            if lock.acquire(blocking=wait):
                with contextlib.suppress(OSError):
                    link.sendall(framed)
                lock.release()

    def _ping(self) -> None:
        while not self._over.wait(_PING_S):
            self._tell_all(frame(_PING))

    def _read(self, peer: int, link: socket.socket) -> None:
        try:
            while True:
                kind, body = read_frame(link)
                if kind == _MESSAGE:
                    self._inbox.put((peer, decode(body)))
                elif kind == _LOST:
                    return self._end_with(body.decode())
                elif kind == _END:
                    self._over.set()
                    return self._inbox.put(None)
        except OSError as error:
            self._lose(peer, error)

    def _lose(self, peer: int, error: OSError) -> None:
        why = f"no sign of life for {_SILENCE_S:g} s" if isinstance(error, TimeoutError) else "its connection broke"
        self._end_with(f"{self._who(peer)} is lost ({why}): this replica ends, start all its processes again")

    def _end_with(self, loss: str) -> None:
        with self._ending:
            if self._over.is_set():
                return
            self._loss = loss
            self._over.set()
        # Before anything that may block; a stuck thread can even hold the locks of the output streams.
        _start_timer(_GRACE_S, os._exit, LOST_EXIT_CODE)
        _write_error(f"{self._who(self.index)}: {loss}")
        if not self.is_leader:
            # Nothing to save here, and JAX aborts every process whose first one is gone, with a core dump.
            _exit_now()
        self._tell_all(frame(_LOST, loss.encode()))
        self._inbox.put(None)
        for link, _ in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # wakes who is sending to a stuck process

    def _who(self, peer: int) -> str:
        return f"process {peer} ({self._names[peer]})" if self._names[peer] else f"process {peer}"

    def _error(self) -> HostsError:
        return HostsError(self._loss or "this replica is closed")

    def _at_exit(self) -> None:
        """Runs before JAX's own hook, which waits for all processes: in vain if this one leaves them."""
        leads_well = self.is_leader and not hasattr(sys, "last_exc")
        if self._loss is None and (leads_well or self._over.is_set()):
            self.close()
        else:
            _exit_now()


def join(num_hosts: int, host_id: int | None = None, coordinator: str | None = None) -> Hosts:
    """Connects this process with the others of its replica; before anything touches a device.

    Args:
      num_hosts: how many processes there are, two or more.
      host_id: which one this is; None: as the cluster (SLURM, a TPU pod, ...) says.
      coordinator: ``address:port`` of process 0, any free port of it; None: as the cluster says.

    Raises:
      HostsError: the processes did not find each other; the message says what to do.
    """
    where = f"process {'?' if host_id is None else host_id} of {num_hosts}, coordinator {coordinator}"
    todo = "start every process with the same number of hosts and coordinator (address and a free port of process 0)"
    # JAX would abort without saying for whom it waited.
    late = f"{where}: not all processes were there after {_START_S} s; {todo}"
    timer = _start_timer(_START_S, lambda: (_write_error(late), _exit_now()))
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_hosts,
            process_id=host_id,
            initialization_timeout=2 * _START_S,
            heartbeat_timeout_seconds=_JAX_SILENCE_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise HostsError(
            f"{where}: {error}; {todo}, each with its own number from 0 on, and join before JAX touches a device"
        ) from error
    finally:
        timer.cancel()
    client, host, index = _coordination()
    try:
        if index == 0:
            key = secrets.token_bytes(_KEY_BYTES)
            with _listen(host) as listener:
                client.key_value_set("sarathi_jax/hosts", f"{listener.getsockname()[1]} {key.hex()}")
                links = _accept(listener, key, num_hosts)
        else:
            port, key = client.blocking_key_value_get("sarathi_jax/hosts", int(_LINK_S * 1000)).split()
            links = {0: _connect((host, int(port)), bytes.fromhex(key), index)}
    except (OSError, RuntimeError) as error:
        raise HostsError(
            f"process {index} did not reach the others of its replica: {error}; all of them must be able to connect to "
            f"any port of {host}, where process 0 runs"
        ) from error
    hosts = Hosts(index, num_hosts, links)
    atexit.register(hosts._at_exit)
    return hosts


def _coordination() -> tuple[Any, str, int]:
    """JAX's key-value store, the address of process 0 and the index of this one.

    Private to JAX, and the only way: what is public needs the devices, or does not tell what a cluster has filled in.
    """
    state = distributed.global_state
    assert state.coordinator_address is not None
    return state.client, state.coordinator_address.rpartition(":")[0].strip("[]"), state.process_id


def _listen(host: str) -> socket.socket:
    """A server on a free port: on loopback if `host` says so, else wherever this machine can be reached."""
    if host == "localhost" or host.startswith("127."):
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(listener: socket.socket, key: bytes, num: int) -> dict[int, socket.socket]:
    """Connections of all followers; whoever does not know the key is sent away."""
    links: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _LINK_S
    while missing := set(range(1, num)) - set(links):
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            link = listener.accept()[0]
        except TimeoutError:
            raise TimeoutError(f"nothing from process {min(missing)} for {_LINK_S:g} s") from None
        link.settimeout(_GREETING_S)
        its_key, index = b"", 0
        with contextlib.suppress(OSError):
            its_key, index = _GREETING.unpack(read_exactly(link, _GREETING.size))
        if hmac.compare_digest(its_key, key) and index in missing:
            links[index] = link
        else:
            link.close()
    for link in links.values():
        link.sendall(_WELCOME)
    return links


def _connect(address: tuple[str, int], key: bytes, index: int) -> socket.socket:
    """Connection of a follower to the leader, once all followers have theirs."""
    link = socket.create_connection(address, _LINK_S)
    link.sendall(_GREETING.pack(key, index))
    read_exactly(link, len(_WELCOME))
    return link


def _start_timer(seconds: float, action: Any, *args: Any) -> threading.Timer:
    timer = threading.Timer(seconds, action, args)
    timer.daemon = True
    timer.start()
    return timer


def _write_error(text: str) -> None:
    os.write(2, f"sarathi_jax, {text}\n".encode())


def _exit_now() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(LOST_EXIT_CODE)
