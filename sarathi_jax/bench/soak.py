"""A load test of the server: many clients for minutes, some of whom leave midway or send garbage.

  python -m sarathi_jax.bench.soak --clients 64 --minutes 5

Every answer is compared with the one that the same question got when it was alone on the server. At the end it prints
what was counted: wrong answers, statuses, blocks that are still owned, and how the server's memory grew.
"""

import asyncio
import collections
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from absl import app, flags

from sarathi_jax.bench.http_client import Answer, ServerProcess, metrics, stream
from sarathi_jax.telemetry.definitions import quantile

MODEL = "soaked"

_CLIENTS = flags.DEFINE_integer("clients", 64, "that ask at the same time", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 5, "of load", lower_bound=0.01)
_LEAVE = flags.DEFINE_float("leave", 0.2, "share of requests whose client leaves at a random moment")
_GARBAGE = flags.DEFINE_float("garbage", 0.05, "share of requests that make no sense")
_QUESTIONS = flags.DEFINE_integer("questions", 64, "different questions", lower_bound=1)
_SERVER = flags.DEFINE_multi_string("server_flag", ["--dtype=float32", "--max_num_seqs=32"], "flag of the server")

_WORDS = "the old house stood at the end of a long road and nobody had lived there for many years when she came".split()
_NEAR_TIE = 1e-3
_GARBAGE_BODIES = (
    b"",
    b"{",
    b"\xff\xfe not utf-8 \x80",
    b"[1, 2, 3]",
    b'{"model": "soaked", "prompt": 5}',
    b'{"model": "soaked", "prompt": "x", "max_tokens": -1}',
    b'{"model": "soaked", "prompt": "x", "max_tokens": 1e400}',
    b'{"model": "soaked", "prompt": "x", "temperature": "hot"}',
    b'{"model": "soaked", "prompt": "x", "nonsense": true}',
    b'{"model": "soaked", "prompt": [99999999]}',
    json.dumps({"model": MODEL, "prompt": "word " * 50_000}).encode(),
)


@dataclasses.dataclass
class Tally:
    """What a load test counts.

    Attributes:
      wrong: what differed, in words.
      num_excused: answers that went another way at a near tie of the likeliest two tokens.
      statuses: of HTTP.
      num_left: answers that the client did not wait for.
    """

    wrong: list[str] = dataclasses.field(default_factory=list)
    num_same: int = 0
    num_excused: int = 0
    num_left: int = 0
    statuses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    ttfts_s: list[float] = dataclasses.field(default_factory=list)
    tbts_s: list[float] = dataclasses.field(default_factory=list)
    num_tokens: int = 0


def questions(number: int) -> list[dict[str, Any]]:
    """Greedy and seeded ones, short and long."""
    generator, asked = random.Random(0), []
    for i in range(number):
        words = generator.choices(_WORDS, k=generator.choice([3, 10, 60, 200]))
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": " ".join(words),
            "max_tokens": generator.choice([8, 32, 96]),
            "logprobs": 5,
        }
        body |= {"temperature": 0} if i % 2 else {"temperature": 0.8, "top_p": 0.9, "seed": i}
        if i % 7 == 0:
            body |= {"stop": [" the"], "frequency_penalty": 0.5}
        asked.append(body)
    return asked


def compare(tally: Tally, body: dict[str, Any], answer: Answer, alone: Answer) -> None:
    """Counts an answer as the same, excused, left midway, or wrong."""
    if answer.status == 200 and answer.error is None and answer.finish_reason is None:
        tally.num_left += 1
        if not alone.text.startswith(answer.text) and not _is_excused(body, answer, alone):
            tally.wrong.append(f"{body['prompt'][:40]!r}: {answer.text[-40:]!r} does not begin {alone.text[-40:]!r}")
    elif (answer.text, answer.finish_reason) == (alone.text, alone.finish_reason):
        tally.num_same += 1
    elif _is_excused(body, answer, alone):
        tally.num_excused += 1
    else:
        tally.wrong.append(f"{body['prompt'][:40]!r}: {answer.status} {answer.error} {answer.text[-60:]!r}")


def _is_excused(body: dict[str, Any], answer: Answer, alone: Answer) -> bool:
    """Whether the first difference is where the likeliest two tokens were nearly as likely."""
    if body["temperature"]:
        return False
    for ours, theirs in zip(answer.logprobs, alone.logprobs, strict=False):
        best = sorted(theirs.values(), reverse=True)[:2]
        if max(ours, key=ours.__getitem__) != max(theirs, key=theirs.__getitem__):
            return best[0] - best[1] < _NEAR_TIE
    return False


async def client(
    session: aiohttp.ClientSession,
    url: str,
    alone: Sequence[tuple[dict, Answer]],
    end_s: float,
    seed: int,
    tally: Tally,
) -> None:
    """Asks one question after another until the time is up."""
    generator = random.Random(seed)
    while time.monotonic() < end_s:
        if generator.random() < _GARBAGE.value:
            answer = await stream(session, url, generator.choice(_GARBAGE_BODIES))
            tally.statuses[answer.status] += 1
            if not 400 <= answer.status < 500:
                tally.wrong.append(f"garbage was answered with {answer.status} {answer.error}")
            continue
        body, expected = generator.choice(alone)
        leaves = generator.random() < _LEAVE.value
        leave_after = generator.randint(1, max(1, len(expected.token_s) - 1)) if leaves else None
        answer = await stream(session, url, body, leave_after=leave_after)
        tally.statuses[answer.status] += 1
        tally.ttfts_s += [] if answer.ttft_s is None else [answer.ttft_s]
        tally.tbts_s += answer.tbts_s
        tally.num_tokens += len(answer.token_s)
        compare(tally, body, answer, expected)


async def soak(server: ServerProcess, num_clients: int, seconds: float) -> dict[str, Any]:
    """Runs the load and reports."""
    tally, sizes = Tally(), []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        alone = [(body, await stream(session, server.url, body)) for body in questions(_QUESTIONS.value)]
        assert all(answer.finish_reason for _, answer in alone), [answer.error for _, answer in alone]
        begin_s = time.monotonic()
        end_s = begin_s + seconds
        clients = [
            asyncio.create_task(client(session, server.url, alone, end_s, seed, tally)) for seed in range(num_clients)
        ]
        while not all(task.done() for task in clients):
            await asyncio.wait(clients, timeout=max(1.0, seconds / 20))
            sizes.append(server.resident_bytes)
        await asyncio.gather(*clients)
        took_s = time.monotonic() - begin_s
        for _ in range(50):
            values = await metrics(session, server.url)
            if not values.get('sarathi_running{replica="0"}'):
                break
            await stream(session, server.url, {"model": MODEL, "prompt": "x", "max_tokens": 1})
            await asyncio.sleep(0.1)
    settled = sizes[len(sizes) // 5]
    return {
        "clients": num_clients,
        "seconds": round(took_s, 1),
        "requests": sum(tally.statuses.values()),
        "statuses": dict(sorted(tally.statuses.items())),
        "same": tally.num_same,
        "excused": tally.num_excused,
        "left": tally.num_left,
        "wrong": len(tally.wrong),
        "first_wrong": tally.wrong[:3],
        "blocks_owned_at_end": values.get('sarathi_blocks{replica="0",state="owned"}'),
        "late_compiles": values.get("sarathi_late_compiles"),
        "preemptions": values.get('sarathi_preemptions_total{replica="0"}'),
        "memory_growth": round(sizes[-1] / settled - 1, 4),
        "memory_mib": round(sizes[-1] / 2**20),
        "tokens_per_s": round(tally.num_tokens / took_s, 1),
        "ttft_ms_p50_p99": [round(1e3 * quantile(tally.ttfts_s, p), 1) for p in (0.5, 0.99)],
        "tbt_ms_p50_p99": [round(1e3 * quantile(tally.tbts_s, p), 1) for p in (0.5, 0.99)],
    }


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess([*_SERVER.value, f"--served_model_name={MODEL}"], Path(folder) / "log") as server,
    ):
        print(json.dumps(asyncio.run(soak(server, _CLIENTS.value, 60 * _MINUTES.value)), indent=1))


if __name__ == "__main__":
    app.run(main)
