"""Compiled programs on disk, which start without being traced.

JAX's own cache spares XLA's work, but to find a program in it JAX must trace and lower it first. For a program that
compiled before that is most of a start. Here a program is found by what it was made from: the code, the versions, the
settings and the shapes. If the code has changed, and the program has not, its text finds it.
"""

import hashlib
import logging
import os
import pickle
import platform
import secrets
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import pallas_kernels
from sarathi_jax.compiling import COMPILE_EVENT

_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class ProgramStore:
    """Programs in a folder, which like JAX's own cache may be removed at any time, and grows until then.

    Reading a program runs what stands in the file, so the folder must be as safe as the code itself.

    Args:
      directory: of the programs.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._environment = _environment()
        self._code = _code()
        # Threads whose latest program came from JAX's own cache, or was made by XLA (or read from that cache) at all.
        self._hits, self._made = set[int](), set[int]()
        this = weakref.ref(self)

        def on_event(event: str, **kwargs: str | int) -> None:
            store = this()
            if store is not None and event == _CACHE_HIT_EVENT:
                store._hits.add(threading.get_ident())

        def on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
            store = this()
            if store is not None and event == COMPILE_EVENT:
                store._made.add(threading.get_ident())

        jax.monitoring.register_event_listener(on_event)
        jax.monitoring.register_event_duration_secs_listener(on_duration)
        weakref.finalize(self, jax.monitoring.unregister_event_listener, on_event)
        weakref.finalize(self, jax.monitoring.unregister_event_duration_listener, on_duration)

    def get(self, about: str, devices: Sequence[Any], trace: Callable[[], jax.stages.Traced]) -> jax.stages.Compiled:
        """A program as stored, or else compiled and stored.

        Args:
          about: all that the program depends on, but for code, versions, settings and devices.
          devices: which it runs on, all of this process.
          trace: makes it.
        """
        place = f"{self._environment} {[(device.id, device.device_kind) for device in devices]}"
        name = self._path(f"{place} {self._code} {about}", "name")
        try:
            path = self._directory / name.read_text()
        except OSError:
            path = None
        program = self._load(path, devices)
        if program is not None:
            return program
        lowered = trace().lower()
        path = self._path(f"{place} {lowered.in_tree} {lowered.out_tree} {lowered.as_text()}", "program")
        program = self._load(path, devices)
        if program is None:
            thread = threading.get_ident()
            self._hits.discard(thread)
            self._made.discard(thread)
            program = lowered.compile()
            # On a CPU, what came out of JAX's cache lacks functions when it is written once more; and what JAX had in
            # memory may have come from there before.
            is_new = thread in self._made and thread not in self._hits
            if not is_new or not self._write(path, lambda: pickle.dumps(serialize(program))):
                return program
        self._write(name, lambda: path.name.encode())
        return program

    def _path(self, text: str, kind: str) -> Path:
        return self._directory / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.{kind}"

    def _load(self, path: Path | None, devices: Sequence[Any]) -> jax.stages.Compiled | None:
        if path is None or not path.exists():
            return None
        try:
            parts = pickle.loads(path.read_bytes())
            program = deserialize_and_load(*parts, backend=devices[0].client, execution_devices=devices)
        except Exception as error:  # a damaged file may do anything
            logging.warning("cannot use the stored program %s (%s): compiling it anew", path, error)
            return None
        return program

    def _write(self, path: Path, content: Callable[[], bytes]) -> bool:
        try:
            data = content()
        except Exception as error:  # what holds a Python function, such as an interpreted kernel, fails in many ways
            logging.info("a program cannot be stored (%s): the next start traces it again", error)
            return False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            logging.warning("cannot store a program (%s): the next start traces it again", error)
            return False
        return True


def _code() -> str:
    """A digest of all that makes programs."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(pallas_kernels.__path__[0])):
        for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json")):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def _environment() -> str:
    """What a compiled program depends on beside its text."""
    client = jax.devices()[0].client
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    # Programs for a CPU use whatever instructions it has.
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    parts: list[Any] = [jax.__version__, jaxlib.__version__, client.platform, client.platform_version, instructions]
    parts += [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts += sorted((name, str(value)) for name, value in jax.config.values.items() if "cache" not in name)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
