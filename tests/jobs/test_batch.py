import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sarathi_jax.jobs.batch import JobError, run_job
from tests.jobs.echo_service import EchoService

SCRIPT = Path(__file__).with_name("echo_service.py")
NUM_ROWS = 40


@pytest.fixture
def files(tmp_path):
    rows = [json.dumps({"id": f"row {i}", "prompt": f"text {i}"}) for i in range(NUM_ROWS)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(files, service=None, **options):
    return run_job(service or EchoService(), *files, {}, progress=False, **options)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_complete(path, num_rows=NUM_ROWS):
    """Every input line is answered once, with its own text."""
    rows = read(path)
    assert sorted(row["line"] for row in rows) == list(range(1, num_rows + 1))
    for row in rows:
        assert row["id"] == f"row {row['line'] - 1}"
        assert row["outputs"][0]["text"] == f"TEXT {row['line'] - 1}"


def test_every_row_is_answered_once(files):
    summary = run(files, max_pending=7)
    check_complete(files[1])
    assert (summary.num_rows, summary.num_before, summary.num_answered, summary.num_errors) == (40, 0, 40, 0)


def test_pending_rows_are_bounded(files):
    class Counting(EchoService):
        most = 0

        def submit(self, row):
            request_id = super().submit(row)
            self.most = max(self.most, len(self.pending))
            return request_id

    service = Counting()
    run(files, service, max_pending=5)
    assert service.most == 5


def test_rows_are_on_disk_as_soon_as_they_are_finished(files):
    class Watching(EchoService):
        def wait(self):
            assert len(read(files[1]) if files[1].exists() else []) == len(self.served)
            return super().wait()

    run(files, Watching())


def test_a_second_run_has_nothing_to_do(files):
    run(files)
    before = files[1].read_bytes()
    service = EchoService()
    summary = run(files, service)
    assert summary.num_before == NUM_ROWS
    assert service.served == []
    assert files[1].read_bytes() == before


def test_kill_9_loses_and_doubles_nothing(files):
    command = [sys.executable, str(SCRIPT), str(files[0]), str(files[1]), "0.01"]
    kills = 0
    for _ in range(30):
        process = subprocess.Popen(command)
        before = files[1].stat().st_size if files[1].exists() else 0
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if files[1].exists() and files[1].stat().st_size > before + 900:  # some rows were written: now
                os.kill(process.pid, signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.002)
        assert process.poll() is not None
        if process.returncode == 0:
            break
    assert process.returncode == 0
    assert kills >= 2
    check_complete(files[1])


def test_a_torn_last_row_is_cut_at_any_byte(files):
    run(files)
    whole = files[1].read_bytes()
    kept = whole[: whole.rstrip(b"\n").rfind(b"\n") + 1]
    last = whole[len(kept) :]
    for length in range(len(last)):
        files[1].write_bytes(kept + last[:length])
        summary = run(files)
        assert summary.num_answered == 1
        check_complete(files[1])


def test_a_first_row_torn_in_half_is_cut(files):
    files[1].write_bytes(b'{"id": "row 3", "li')
    run(files)
    check_complete(files[1])


def test_zeros_left_by_a_power_cut_are_cut(files):
    run(files)
    with open(files[1], "ab") as file:
        file.write(b"\0" * 100 + b"\n")
    run(files)
    check_complete(files[1])


def test_bad_rows_become_error_rows_and_the_others_go_on(files):
    lines = files[0].read_text().splitlines()
    lines[4] = "{"
    lines[9] = json.dumps({"id": "mine", "prompt": "a", "sampling_params": {"n": 0}})
    lines[20] = json.dumps({"id": "empty", "prompt": ""})
    lines[30] = ""
    files[0].write_text("\n".join(lines))  # and no newline at the end
    summary = run(files)
    assert (summary.num_rows, summary.num_answered, summary.num_errors) == (39, 36, 3)
    errors = {row["line"]: row for row in read(files[1]) if "error" in row}
    assert {line: row["id"] for line, row in errors.items()} == {5: 5, 10: "mine", 21: "empty"}
    assert errors[10]["error"].startswith("line 10: sampling_params: n=0")
    assert summary.first_error.startswith("line 5: not JSON")
    assert run(files).num_before == 39


@pytest.mark.parametrize("content", ["precious notes\n", "precious notes", '{"line": "x"}\n', "[]\nmore\n"])
def test_a_file_that_is_no_output_is_left_alone(files, content):
    files[1].write_text(content)
    with pytest.raises(JobError, match="name another output"):
        run(files)
    assert files[1].read_text() == content


def test_an_output_of_another_input_is_refused(files):
    run(files)
    files[0].write_text(files[0].read_text().replace("row 7", "row x"))
    with pytest.raises(JobError, match="has another id"):
        run(files)
    files[0].write_text("")
    with pytest.raises(JobError, match="does not have"):
        run(files)


def test_an_output_that_answers_a_row_twice_is_refused(files):
    run(files)
    text = files[1].read_text()
    files[1].write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(JobError, match="twice"):
        run(files)


def test_input_and_output_must_differ(files):
    with pytest.raises(JobError, match="both input and output"):
        run((files[0], files[0]))


def test_two_jobs_do_not_write_one_file(files):
    class Second(EchoService):
        def wait(self):
            with pytest.raises(JobError, match="another process is writing"):
                run(files)
            return super().wait()

    run(files, Second())
    check_complete(files[1])


def test_a_full_disk_stops_the_job_and_loses_nothing(files):
    class Full(EchoService):
        def wait(self):
            if len(self.served) > 10:
                raise OSError(28, "No space left on device")
            return super().wait()

    with pytest.raises(OSError, match="No space left"):
        run(files, Full())
    run(files)
    check_complete(files[1])
