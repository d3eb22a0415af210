"""A service that answers a prompt with itself in capitals, out of order and after a moment; run as a job by the tests.

Usage: echo_service.py INPUT OUTPUT STEP_S
"""

import itertools
import random
import sys
import time
from pathlib import Path

from sarathi_jax.jobs.batch import run_job
from sarathi_jax.request import CompletionOutput, RequestError, RequestMetrics, RequestOutput


class EchoService:
    """Finishes one to three of the pending rows at each step."""

    def __init__(self, step_s=0.0):
        self.step_s = step_s
        self.pending = {}
        self.ids = itertools.count()
        self.served = []
        self.random = random.Random(0)

    def submit(self, row):
        if row.prompt == "":
            raise RequestError("the prompt is empty")
        request_id = f"r{next(self.ids)}"
        self.pending[request_id] = row
        return request_id

    def wait(self):
        time.sleep(self.step_s)
        chosen = self.random.sample(sorted(self.pending), min(len(self.pending), self.random.randint(1, 3)))
        return [self.answer(request_id) for request_id in chosen]

    def answer(self, request_id):
        row = self.pending.pop(request_id)
        self.served.append(row.line)
        sample = CompletionOutput(0, row.prompt.upper(), (1,), finish_reason="length")
        return RequestOutput(request_id, row.prompt, (1,), (sample,), True, RequestMetrics(0.0, finished_s=1.0))


if __name__ == "__main__":
    run_job(EchoService(float(sys.argv[3])), Path(sys.argv[1]), Path(sys.argv[2]), {}, progress=False)
