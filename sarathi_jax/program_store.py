"""Compiled programs on disk, which start without being traced.

JAX's own cache spares XLA's work, but to find a program in it JAX must trace and lower it first. For a program that
compiled before that is most of a start. Here a program is found by what it was made from.
"""

import hashlib
import logging
import os
import pickle
import platform
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import pallas_kernels

_NUM_VERSIONS = 4


class ProgramStore:
    """Programs of one version of everything: code, JAX, its settings, and the processor.

    Programs of all but the latest few versions are removed. Reading a program runs what stands in the file, so the
    folder must be as safe as the code itself.

    Args:
      directory: of all versions.
    """

    def __init__(self, directory: Path):
        self._folder = directory / _version()
        self._others = directory

    def get(self, about: str, devices: Sequence[Any], trace: Callable[[], jax.stages.Traced]) -> jax.stages.Compiled:
        """A program as stored, or else compiled and stored.

        Args:
          about: all that the program depends on, but for the version and the devices.
          devices: which it runs on, all of this process.
          trace: makes it.
        """
        kinds = [(device.id, device.device_kind) for device in devices]
        path = self._folder / hashlib.sha256(f"{about} {kinds}".encode()).hexdigest()[:32]
        try:
            parts = pickle.loads(path.read_bytes())
            return deserialize_and_load(*parts, backend=devices[0].client, execution_devices=devices)
        except FileNotFoundError:
            pass
        except Exception as error:  # a damaged file may do anything
            logging.warning("cannot use the stored program %s (%s): compiling it anew", path, error)
        program = trace().lower().compile()
        self._keep(path, program)
        return program

    def _keep(self, path: Path, program: jax.stages.Compiled) -> None:
        try:
            parts = pickle.dumps(serialize(program))
        except Exception as error:  # what holds a Python function, such as an interpreted kernel, fails in many ways
            logging.info("a program cannot be stored (%s): the next start traces it again", error)
            return
        try:
            if not path.parent.exists():
                self._forget()
                path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            partial.write_bytes(parts)
            os.replace(partial, path)
        except OSError as error:
            logging.warning("cannot store a program (%s): the next start traces it again", error)

    def _forget(self) -> None:
        """Makes room for a version."""
        versions = sorted(self._others.glob("*"), key=lambda folder: folder.stat().st_mtime)
        for folder in versions[: max(0, len(versions) - _NUM_VERSIONS + 1)]:
            shutil.rmtree(folder, ignore_errors=True)


def _version() -> str:
    """What programs of all kinds depend on."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(pallas_kernels.__path__[0])):
        for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json")):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    client = jax.devices()[0].client
    parts: list[Any] = [jax.__version__, jaxlib.__version__, client.platform, client.platform_version, _processor()]
    parts += [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts += sorted((name, str(value)) for name, value in jax.config.values.items() if "cache" not in name)
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Programs for a CPU use whatever instructions it has."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return platform.processor() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
