"""Server processes on free ports of this machine."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
START_S = 150


@dataclasses.dataclass
class Process:
    """A running server.

    Attributes:
      url: where it listens.
      log: file with its standard error.
    """

    popen: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.popen.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        return self.popen.wait(timeout_s)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextlib.contextmanager
def started(command: list[str], **environment: str) -> Iterator[Process]:
    """Starts a server and waits until it serves; kills what is left of it afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with open(log, "w") as errors:
            popen = subprocess.Popen(
                [sys.executable, *command],
                cwd=REPO,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            began_s, line = time.monotonic(), ""
            assert popen.stdout is not None
            while not line.startswith("serving at "):
                line = popen.stdout.readline()
                assert line, f"the server did not start: {log.read_text()}"
                assert time.monotonic() - began_s < START_S
            yield Process(popen, line.split()[-1], log)
        finally:
            popen.kill()
            popen.wait()


def serve(model: Path, *flags: str) -> list[str]:
    """The command for the model of the fixture `tiny`."""
    sizes = ("--max_model_len=512", "--max_num_seqs=8", "--token_buckets=16,64", "--block_size=8", "--num_blocks=256")
    return ["main.py", "serve", f"--model={model}", "--served_model_name=tiny", "--port=0", *sizes, *flags]
