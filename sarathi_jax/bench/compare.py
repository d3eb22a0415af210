"""Commands that print one JSON line a case, run in turn (A B A B), and their ratios: machines drift, ratios less.

  python -m sarathi_jax.bench.compare --rounds 3 \\
    --run "ours=python -m sarathi_jax.bench.throughput --model DIR --cases cases.json --repeats 1" \\
    --run "peer=peer/bin/python run_peer.py DIR cases.json 1"

Each line must hold "requests", "prompt_tokens", "output_tokens" and "total_tok_s"; other lines are ignored. Prints the
median of every command and the ratio of the first one's to each other's, as a Markdown table.
"""

import collections
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

from absl import app, flags

_RUNS = flags.DEFINE_multi_string("run", None, "NAME=COMMAND; twice or more, ours first", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "how often each command runs", lower_bound=1)

Case = tuple[int, int, int]
Rates = dict[Case, list[float]]


def parse(lines: Iterable[str]) -> dict[Case, float]:
    """Total tokens a second by case (requests, prompt tokens, output tokens)."""
    rates = {}
    for line in lines:
        try:
            fields = json.loads(line)
            case = fields["requests"], fields["prompt_tokens"], fields["output_tokens"]
            rates[case] = float(fields["total_tok_s"])
        except (ValueError, KeyError, TypeError):
            continue
    return rates


def table(rates: Mapping[str, Rates]) -> str:
    """Markdown: a row a case; medians, and the ratio of the first command's to the others'."""
    names = list(rates)
    first, others = names[0], names[1:]
    header = ["requests x (prompt + output)", *(f"{name} tok/s" for name in names), *(f"{first} / {n}" for n in others)]
    rows = [header, ["---"] * len(header)]
    for case in rates[first]:
        medians = {name: statistics.median(rates[name][case]) for name in names if rates[name].get(case)}
        cells = [f"{medians[name]:.1f}" if name in medians else "failed" for name in names]
        cells += [f"{medians[first] / medians[name]:.2f}" if name in medians else "-" for name in others]
        rows.append([f"{case[0]} x ({case[1]} + {case[2]})", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    commands = dict(run.split("=", 1) for run in _RUNS.value)
    rates: dict[str, Rates] = {name: collections.defaultdict(list) for name in commands}
    for round_number in range(_ROUNDS.value):
        for name, command in commands.items():
            print(f"round {round_number + 1} of {_ROUNDS.value}: {name}", file=sys.stderr, flush=True)
            done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name} ended with status {done.returncode}: {done.stderr[-500:]}", file=sys.stderr)
            for case, rate in parse(done.stdout.splitlines()).items():
                rates[name][case].append(rate)
    print(table(rates))


if __name__ == "__main__":
    app.run(main)
