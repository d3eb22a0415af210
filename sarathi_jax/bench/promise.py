"""Whether a promised time between tokens is kept under an open load, by this policy and by prefill first, over HTTP.

  python -m sarathi_jax.bench.promise --trace TRACE.csv --minutes 3 --rounds 2 --picture docs/promise.svg

1. A server without a promise decodes as many requests as it takes, each of half the context; the time between their
   tokens is the decode-only step time. The promise is five times that (the paper's strict target, section 5).
2. A server that promises it serves the trace from clients that wait for each answer: what it completes is the capacity.
3. Requests arrive as a Poisson process at `--load` of the capacity, whether or not others are done: at a server that
   keeps the promise, at one with the policy vllm (whole prompts first), in turn. Arrivals, lengths and prompts are the
   same.

Without `--trace` the lengths are drawn from the quantiles that the paper gives of its chat trace.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from absl import app, flags

from sarathi_jax.bench.http_client import Answer, ServerProcess, stream
from sarathi_jax.bench.promise_picture import draw
from sarathi_jax.resources import checkpoint_path
from sarathi_jax.telemetry.definitions import quantile
from sarathi_jax.weights.directory import load_model_config
from sarathi_jax.workloads import CHAT, Length, poisson, read_trace, scaled, synthesise

_MODEL = flags.DEFINE_string("model", None, "model folder; without it the model that ships")
_DTYPE = flags.DEFINE_enum("dtype", "auto", ("auto", "float32", "bfloat16"), "of weights and cache")
_CONTEXT = flags.DEFINE_integer("context", 2048, "longest prompt + output of the scaled trace", lower_bound=16)
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 32, "sequences at once", lower_bound=1)
_TRACE = flags.DEFINE_string("trace", None, "CSV file of lengths; without it they are drawn from published quantiles")
_LOAD = flags.DEFINE_float("load", 0.85, "share of the capacity that arrives", lower_bound=0.01)
_MINUTES = flags.DEFINE_float("minutes", 3, "of arrivals in each run", lower_bound=0.01)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "runs of each policy", lower_bound=1)
_PICTURE = flags.DEFINE_string("picture", None, "file for a picture (.svg or .png)")
_SEED = flags.DEFINE_integer("seed", 0, "of lengths, prompts and arrivals")

TIMES_DECODE = 5  # the paper's strict target


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request: when it comes, and what it asks for."""

    at_s: float
    body: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one policy did with the arrivals.

    Attributes:
      answers: in the order of the arrivals.
      seconds: until the last answer had ended.
    """

    policy: str
    answers: Sequence[Answer]
    seconds: float

    @property
    def tbts_s(self) -> list[float]:
        """Times between tokens, of all requests."""
        return [gap for answer in self.answers for gap in answer.tbts_s]

    def figures(self, slo_s: float) -> dict[str, Any]:
        """What is reported."""
        tbts_s = self.tbts_s
        ttfts_s = [answer.ttft_s for answer in self.answers if answer.ttft_s is not None]
        return {
            "policy": self.policy,
            "tbt_p99_ms": round(1e3 * quantile(tbts_s, 0.99), 1),
            "tbt_p50_ms": round(1e3 * quantile(tbts_s, 0.5), 1),
            "tbt_max_ms": round(1e3 * max(tbts_s), 1),
            "share_of_tbts_late": round(sum(gap > slo_s for gap in tbts_s) / len(tbts_s), 5),
            "requests_with_a_late_token": sum(any(gap > slo_s for gap in answer.tbts_s) for answer in self.answers),
            "ttft_p50_s": round(quantile(ttfts_s, 0.5), 3),
            "ttft_p99_s": round(quantile(ttfts_s, 0.99), 3),
            "requests": len(self.answers),
            "failed": sum(answer.finish_reason is None for answer in self.answers),
            "requests_per_s": round(len(self.answers) / self.seconds, 3),
            "output_tok_s": round(sum(len(answer.token_s) for answer in self.answers) / self.seconds, 1),
        }


def lengths() -> list[Length]:
    """The trace, in random order, scaled to the context."""
    recorded = read_trace(Path(_TRACE.value)) if _TRACE.value else synthesise(CHAT, 20_000, _SEED.value)
    random.Random(_SEED.value).shuffle(recorded)
    return scaled(recorded, CHAT.longest, _CONTEXT.value)


def body_of(length: Length, vocab_size: int, generator: random.Random) -> dict[str, Any]:
    """A request of random tokens, which share no prefix, for exactly that many tokens."""
    return {
        "model": "promised",
        "prompt": [generator.randrange(min(10, vocab_size - 1), vocab_size) for _ in range(length.prompt)],
        "max_tokens": length.output,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


@contextlib.asynccontextmanager
async def connections() -> AsyncIterator[aiohttp.ClientSession]:
    """As many at once as are asked for, without a limit of time."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        yield session


async def decode_only_s(url: str, bodies: Sequence[dict[str, Any]]) -> float:
    """Median time between tokens while all of these requests decode, and none computes its prompt."""
    async with connections() as session:
        answers = await asyncio.gather(*(stream(session, url, body) for body in bodies))
    assert all(answer.finish_reason for answer in answers), [answer.error for answer in answers]
    begin_s = max(answer.token_s[0] for answer in answers)
    end_s = min(answer.token_s[-1] for answer in answers)
    gaps = [
        later - earlier
        for answer in answers
        for earlier, later in itertools.pairwise(answer.token_s)
        if earlier >= begin_s and later <= end_s
    ]
    return statistics.median(gaps)


async def capacity(url: str, bodies: Sequence[dict[str, Any]], num_clients: int, seconds: float) -> float:
    """Requests a second that are completed when as many clients as this always wait for an answer."""
    waiting, ends_s = iter(bodies), []
    begin_s = time.monotonic()

    async def client(session: aiohttp.ClientSession) -> None:
        for body in waiting:
            answer = await stream(session, url, body)
            assert answer.finish_reason, answer.error
            ends_s.append(time.monotonic())
            if time.monotonic() - begin_s > seconds:
                return

    async with connections() as session:
        await asyncio.gather(*(client(session) for _ in range(num_clients)))
    # Once it is in full swing, and before it runs dry.
    steady = [end_s - begin_s for end_s in ends_s if seconds / 4 <= end_s - begin_s <= seconds]
    return len(steady) / (seconds * 3 / 4)


async def open_load(policy: str, url: str, arrivals: Sequence[Arrival]) -> Run:
    """Sends every request at its time."""
    begin_s = time.monotonic()

    async def ask(session: aiohttp.ClientSession, arrival: Arrival) -> Answer:
        await asyncio.sleep(begin_s + arrival.at_s - time.monotonic())
        return await stream(session, url, arrival.body)

    async with connections() as session:
        answers = await asyncio.gather(*(ask(session, arrival) for arrival in arrivals))
    return Run(policy, answers, time.monotonic() - begin_s)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a run."""
    names = list(runs[0])
    rows = [names, ["---"] * len(names), *([str(run[name]) for name in names] for run in runs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    model = Path(_MODEL.value) if _MODEL.value else checkpoint_path()
    vocab_size = load_model_config(model).vocab_size
    generator = random.Random(_SEED.value)
    common = [
        f"--model={model}",
        f"--dtype={_DTYPE.value}",
        f"--max_model_len={_CONTEXT.value}",
        f"--max_num_seqs={_MAX_NUM_SEQS.value}",
        "--served_model_name=promised",
        "--nolog_requests",
        "--max_waiting=100000",
        "--max_concurrent_requests=100000",
        "--request_timeout_s=100000",
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        half = Length(_CONTEXT.value // 2, _CONTEXT.value // 8)
        with ServerProcess(common, log) as server:
            bodies = [body_of(half, vocab_size, generator) for _ in range(_MAX_NUM_SEQS.value)]
            decode_s = asyncio.run(decode_only_s(server.url, bodies))
        slo_s = TIMES_DECODE * decode_s
        print(f"decode-only step {1e3 * decode_s:.1f} ms, promise {1e3 * slo_s:.1f} ms", file=sys.stderr)
        flags_of = {
            "sarathi": [*common, f"--tbt_slo_ms={1e3 * slo_s:.1f}"],
            "vllm": [*common, "--policy=vllm", f"--token_budget={_CONTEXT.value}"],
        }
        asked = iter(lengths())
        with ServerProcess(flags_of["sarathi"], log) as server:
            bodies = [body_of(length, vocab_size, generator) for length in itertools.islice(asked, 5000)]
            seconds = 60 * min(_MINUTES.value, 2)
            rate = asyncio.run(capacity(server.url, bodies, 2 * _MAX_NUM_SEQS.value, seconds))
        print(f"capacity {rate:.3f} requests/s", file=sys.stderr)
        number = max(1, round(rate * _LOAD.value * 60 * _MINUTES.value))
        times = poisson(rate * _LOAD.value, number, _SEED.value)
        arrivals = [
            Arrival(at_s, body_of(length, vocab_size, generator)) for at_s, length in zip(times, asked, strict=False)
        ]
        runs = []
        for _, (policy, arguments) in itertools.product(range(_ROUNDS.value), flags_of.items()):
            with ServerProcess(arguments, log) as server:
                # The prefix cache of a server is its own, and lives as long: nothing is found in it.
                runs.append(asyncio.run(open_load(policy, server.url, arrivals)))
            print(json.dumps(runs[-1].figures(slo_s)), file=sys.stderr, flush=True)
    print(f"decode-only step {1e3 * decode_s:.1f} ms, promise {1e3 * slo_s:.1f} ms; capacity {rate:.3f} requests/s,")
    print(f"load {_LOAD.value:.0%} of it\n\n{table([run.figures(slo_s) for run in runs])}")
    if _PICTURE.value:
        draw(runs[-2:], slo_s, Path(_PICTURE.value))


if __name__ == "__main__":
    app.run(main)
