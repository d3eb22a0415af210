"""A batch job over JSON lines that survives `kill -9`: run it again and it goes on where it stopped.

The output file is the only state. Every finished row is appended with one write and carries the number of its input
line, so a restart reads which lines are answered, cuts off a last row that was torn in half, and does the rest.
"""

import dataclasses
import fcntl
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from sarathi_jax.jobs.rows import InputRow, RowError, dump, output_fields, parse_row, read_id
from sarathi_jax.request import RequestError, RequestOutput


class JobError(RuntimeError):
    """A job that cannot start or go on; the message says what to do. Rows already written are safe."""


class Service(Protocol):
    """Who answers the rows."""

    def submit(self, row: InputRow) -> str:
        """Takes a row on and names its request; `RequestError` if it can never be served."""
        ...

    def wait(self) -> list[RequestOutput]:
        """Works a little; returns the requests that have finished by it."""
        ...


@dataclasses.dataclass(frozen=True)
class JobSummary:
    """What a job did.

    Attributes:
      num_rows: non-empty input lines.
      num_before: of these, answered by earlier runs.
      num_answered: answered by this run.
      num_errors: rows of this run that became error rows.
      first_error: the first of these, for a person to read.
    """

    num_rows: int
    num_before: int
    num_answered: int
    num_errors: int
    first_error: str | None


def run_job(
    service: Service,
    input_path: Path,
    output_path: Path,
    defaults: Mapping[str, Any],
    *,
    max_pending: int = 64,
    progress: bool = True,
) -> JobSummary:
    """Answers every input row that the output file does not answer yet, each as soon as it is finished.

    Args:
      service: who answers.
      input_path: JSON lines, see `sarathi_jax.jobs.rows.parse_row`; empty lines are skipped.
      output_path: JSON lines `{"id", "line", ...}`; made if missing, appended to otherwise. A row that cannot be read
        or served gets `{"id", "line", "error"}`.
      defaults: sampling parameters of rows that do not set their own.
      max_pending: rows in the service's hands at once.
      progress: whether to draw a progress bar on stderr.

    Raises:
      JobError: the output is not of this job, or another process writes it.
      OSError: a file cannot be read or written.
    """
    if output_path.exists() and os.path.samefile(input_path, output_path):
        raise JobError(f"{input_path} is both input and output; name another output")
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with open(output_path, "ab", buffering=0) as output:
        _lock(output, output_path)
        done = _recover(output_path)
        num_rows = _check(input_path, output_path, done)
        job = _Job(service, output, max_pending)
        with tqdm(total=num_rows, initial=len(done), unit="row", disable=not progress, file=sys.stderr) as bar:
            for _ in job.run(_pending(input_path, done), defaults):
                bar.update()
        os.fsync(output.fileno())
    return JobSummary(num_rows, len(done), job.num_answered, job.num_errors, job.first_error)


class _Job:
    """Keeps the service supplied and writes down what it finishes."""

    def __init__(self, service: Service, output: io.FileIO, max_pending: int):
        self.service = service
        self.output = output
        self.max_pending = max_pending
        self.running: dict[str, InputRow] = {}
        self.num_answered = 0
        self.num_errors = 0
        self.first_error: str | None = None

    def run(self, lines: Iterator[tuple[int, bytes]], defaults: Mapping[str, Any]) -> Iterator[None]:
        """Yields once for each row written."""
        for line, text in lines:
            try:
                row = parse_row(text, line, defaults)
                self.running[self.service.submit(row)] = row
            except (RowError, RequestError) as error:
                self._write_error(read_id(text, line), line, str(error))
                yield
            while len(self.running) >= self.max_pending:
                yield from self._collect()
        while self.running:
            yield from self._collect()

    def _collect(self) -> Iterator[None]:
        for output in self.service.wait():
            row = self.running.pop(output.request_id)
            self._write({"id": row.row_id, "line": row.line, **output_fields(output)})
            self.num_answered += 1
            yield

    def _write_error(self, row_id: str | int, line: int, error: str) -> None:
        self._write({"id": row_id, "line": line, "error": f"line {line}: {error}"})
        self.num_errors += 1
        self.first_error = self.first_error or f"line {line}: {error}"

    def _write(self, fields: Mapping[str, Any]) -> None:
        rest = memoryview((dump(fields) + "\n").encode())
        while rest:  # one write as a rule; a full disk may take a part and then raise
            rest = rest[self.output.write(rest) :]


def _lock(output: io.FileIO, path: Path) -> None:
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JobError(f"another process is writing {path}; wait for it or name another output") from None


def _recover(path: Path) -> dict[int, str | int]:
    """Reads which lines are answered (line -> id) and cuts a torn last row off."""
    done: dict[int, str | int] = {}
    end = 0
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for number, text in enumerate(file, 1):
            fields = _output_row(text)
            if fields is None:
                if end + len(text) < size:
                    raise JobError(f"line {number} of {path} is not a row of a batch job; name another output")
                break
            if fields["line"] in done:
                raise JobError(f"{path} answers input line {fields['line']} twice; name another output")
            done[fields["line"]] = fields["id"]
            end += len(text)
    if end < size:
        if not done and _looks_foreign(path):
            raise JobError(f"{path} is not the output of a batch job; name another output")
        os.truncate(path, end)
    return done


def _output_row(text: bytes) -> dict[str, Any] | None:
    """A complete output row, or None."""
    if not text.endswith(b"\n"):
        return None
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and isinstance(fields.get("line"), int) and "id" in fields else None


def _looks_foreign(path: Path) -> bool:
    """Whether a file without one complete row starts otherwise than a row does: then it is not ours to cut."""
    start = b'{"id": '
    with open(path, "rb") as file:
        return file.read(len(start)) != start[: os.path.getsize(path)]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, text


def _pending(path: Path, done: Mapping[int, str | int]) -> Iterator[tuple[int, bytes]]:
    return ((line, text) for line, text in _lines(path) if line not in done)


def _check(input_path: Path, output_path: Path, done: Mapping[int, str | int]) -> int:
    """Counts the input rows; refuses an output whose rows do not belong to them."""
    num_rows = 0
    unseen = dict(done)
    for line, text in _lines(input_path):
        num_rows += 1
        if line in unseen and unseen.pop(line) != read_id(text, line):
            raise JobError(f"{output_path} answers another input: line {line} of {input_path} has another id")
    if unseen:
        raise JobError(f"{output_path} answers line {min(unseen)}, which {input_path} does not have")
    return num_rows
