"""Says which devices, how many, and which tp, pp, replicas and token budget serve a workload within an SLO at the least
cost, and why every other choice was rejected.

Four requests a second of the paper's chat lengths on Yi-34B, 0.2 s between tokens:
  PROGRAM plan --model yi-34b --trace chat --rate 4 --slo_ms 200

Your own trace and prices, two kinds of devices, everything kept in a folder:
  PROGRAM plan --model llama2-70b --trace my_trace.csv --rate 2 --slo_ms 500 --devices a100-80gb,h100 \\
    --price a100-80gb=1.29 --price h100=2.49 --out results/plan

Other choices; slo lets the server choose the budget of every step:
  PROGRAM plan --model mistral-7b --rate 10 --slo_ms 100 --tps 1,2 --pps 1 --budgets 256,512,1024,slo

Prices are examples in dollars an hour: give your own. Capacities are simulated; see docs/planning.md.
"""

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from sarathi_jax.cli.capacity import print_trial, rated_spec
from sarathi_jax.cli.deployment_flags import define_deployment_flags, host_of, model_and_engine
from sarathi_jax.cli.fields import UsageError
from sarathi_jax.cli.results import finite, write_rows
from sarathi_jax.cli.workload_flags import define_workload_flags
from sarathi_jax.config import ConfigError
from sarathi_jax.latency import DEVICES, DeviceError, device_of
from sarathi_jax.simulate import Deployment
from sarathi_jax.simulate.choices import PRICES, Choice, Demand, Options, Plan

if TYPE_CHECKING:
    from sarathi_jax.simulate.capacity import Capacity

SUMMARY = "finds the cheapest devices, tp, pp, replicas and budget for a workload and an SLO"

_NUM_REQUESTS, _MOST_REQUESTS, _MAX_NUM_SEQS = 128, 1024, 128
_SAMPLE = 4096  # of requests, for the mean of their lengths
_RESOLUTION = 0.1  # of capacities that delays bound, by the number of requests
_COARSE_TOLERANCE, _LOWEST = 0.25, 1 / 64  # of the first search, and of the rate that it begins with
_CHOSEN = (
    "device",
    "table",
    "tp",
    "pp",
    "pp_layers",
    "dp",
    "token_budget",
    "token_buckets",
    "num_blocks",
    "tbt_slo_ms",
)
_SHOWN = 8  # rejected choices in the table; all are in the files


def define(values: flags.FlagValues) -> None:
    """Defines the flags: what is asked for, the choices, the workload's, then the model's."""
    flags.DEFINE_float("rate", None, "requests a second, of all replicas together.", flag_values=values)
    flags.DEFINE_float("slo_ms", None, "P99 of the times between tokens.", flag_values=values)
    flags.DEFINE_list(
        "devices", ["a100-80gb", "h100"], f"of {', '.join(DEVICES)}, or files that calibrate wrote.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "price",
        None,
        "DEVICE=DOLLARS an hour of one device, as often as you like; the examples are "
        + ", ".join(f"{name}={price:g}" for name, price in PRICES.items()),
        flag_values=values,
    )
    flags.DEFINE_list("tps", ["1", "2", "4", "8"], "devices of a stage.", flag_values=values)
    flags.DEFINE_list("pps", ["1", "2"], "stages.", flag_values=values)
    flags.DEFINE_list(
        "budgets", ["512", "2048", "slo"], "tokens of a step; slo: chosen for each step by the SLO.", flag_values=values
    )
    flags.DEFINE_integer("max_devices", 16, "of one replica.", flag_values=values)
    flags.DEFINE_integer("max_replicas", 64, "of one choice.", flag_values=values)
    flags.DEFINE_float(
        "dearest",
        2.0,
        "what must cost more than so many times the cheapest choice found is not simulated.",
        flag_values=values,
    )
    flags.DEFINE_float("tolerance", 0.05, "share by which capacities may be too low.", flag_values=values)
    flags.DEFINE_integer("num_seeds", 2, "runs at each rate of close searches, pooled.", flag_values=values)
    flags.DEFINE_string("out", None, "folder for plan.json, choices.csv and a picture.", flag_values=values)
    define_workload_flags(values, skip=("rate",))
    values[
        "num_requests"
    ].help = f"of each run; none: {_NUM_REQUESTS} to {_MOST_REQUESTS}, more where more are served in a second."
    define_deployment_flags(values, skip=_CHOSEN)
    values["max_num_seqs"].help = f"sequences that may run at once in a replica; without it {_MAX_NUM_SEQS}."
    values["max_num_seqs"].default = None


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Plans; returns the exit status: 0 with a choice, 1 where nothing serves this."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; everything is given by flags")
    for name, words in (("rate", "requests a second"), ("slo_ms", "milliseconds between tokens")):
        value = getattr(values, name)
        if value is None or not 0 < value < math.inf:
            raise UsageError(f"--{name} says how many {words}: give it, above 0")
    for name in ("tolerance", "num_seeds", "max_devices", "max_replicas"):
        if not 0 < getattr(values, name) < math.inf:
            raise UsageError(f"--{name}={getattr(values, name):g} must be above 0")
    options = _options(values)
    spec = rated_spec(values, _NUM_REQUESTS)
    model, engine = model_and_engine(values, _CHOSEN)
    if not values["max_num_seqs"].present:
        engine = dataclasses.replace(engine, max_num_seqs=_MAX_NUM_SEQS)
    if engine.policy != "sarathi":
        raise UsageError(f"--policy={engine.policy}: a plan chooses the token budgets of sarathi: leave it out")
    base = Deployment(model, device_of(options.devices[0]), engine, host=host_of(values), pads=values.pads)
    workloads = spec.open(engine.max_model_len or model.max_position)
    print(workloads.source, file=sys.stderr)
    sample = dataclasses.replace(workloads, number=_SAMPLE).at(1.0, spec.seed).requests()
    demand = Demand.of(sample, values.rate, values.slo_ms / 1e3)

    from tqdm import tqdm

    from sarathi_jax.simulate.capacity import delay_resolution, find_capacity
    from sarathi_jax.simulate.planner import plan
    from sarathi_jax.simulate.probes import simulated

    def search(deployment: Deployment, guess: float, closely: bool) -> "Capacity":
        bar.set_postfix_str(_words(deployment))
        number = workloads.number
        if values.num_requests is None:
            number = min(max(number, math.ceil(delay_resolution(guess, 1) / _RESOLUTION)), _MOST_REQUESTS)
        return find_capacity(
            simulated(deployment, dataclasses.replace(workloads, number=number).at),
            tbt_slo_s=demand.tbt_slo_s,
            guess=guess,
            step=1 + _COARSE_TOLERANCE if closely else 2.0,
            lowest=guess * _LOWEST,
            tolerance=values.tolerance if closely else _COARSE_TOLERANCE,
            seeds=range(spec.seed, spec.seed + values.num_seeds) if closely else (spec.seed,),
            on_trial=print_trial if values.v else None,
        )

    def decided(choice: Choice) -> None:
        bar.update(choice.name not in seen)
        seen.add(choice.name)

    seen = set[str]()
    with tqdm(total=None, unit="choice", desc="choices", disable=not sys.stderr.isatty()) as bar:
        answer = plan(base, demand, options, search, decided)
    print(_table(answer))
    if values.out is not None:
        _write(answer, options, Path(values.out).expanduser(), workloads.source)
    return 0 if answer.best is not None else 1


def _options(values: flags.FlagValues) -> Options:
    prices = dict(PRICES)
    for item in values.price or ():
        name, _, price = item.partition("=")
        try:
            prices[name] = float(price)
        except ValueError:
            raise UsageError(f"--price={item}: write DEVICE=DOLLARS, such as a100-80gb=1.29") from None
    try:
        return Options(
            devices=tuple(dict.fromkeys(values.devices)),
            prices=prices,
            tps=_counts(values, "tps"),
            pps=_counts(values, "pps"),
            budgets=tuple(None if item == "slo" else _count(item, "budgets") for item in values.budgets),
            max_devices=values.max_devices,
            max_replicas=values.max_replicas,
            dearest=values.dearest,
        )
    except (ConfigError, DeviceError) as error:
        raise UsageError(str(error)) from None


def _counts(values: flags.FlagValues, name: str) -> tuple[int, ...]:
    return tuple(_count(item, name) for item in getattr(values, name))


def _count(item: str, name: str) -> int:
    if not item.isdecimal() or int(item) < 1:
        word = " or slo" if name == "budgets" else ""
        raise UsageError(f"--{name}: {item!r} is not a number above 0{word}; write them with commas between")
    return int(item)


def _words(deployment: Deployment) -> str:
    engine = deployment.engine
    budget = "by SLO" if engine.tbt_slo_ms is not None else f"{engine.token_budget}"
    return f"{deployment.device.name} tp={engine.tp} pp={engine.pp} budget {budget}"


def _table(answer: Plan) -> str:
    """The possible choices, some of the others with their reasons, and the answer."""
    demand, best = answer.demand, answer.best
    asked = f"{demand.rate:g} requests/s with a P99 TBT of {1e3 * demand.tbt_slo_s:g} ms"
    lines = []
    possible = [choice for choice in answer.choices if choice.is_possible]
    rejected = [choice for choice in answer.choices if not choice.is_possible]
    if possible:
        lines.append(f"{'$/h':>9} {'replicas':>8} {'each/s':>8} {'P99 TBT':>10}  choice")
        for choice in possible:
            mark = "*" if choice in answer.front else " "
            about = "" if choice.is_close else "~"
            each, tbt = f"{about}{choice.capacity:.3g}", f"{1e3 * choice.p99_tbt_s:.1f} ms"
            lines.append(f"{choice.cost:9.2f} {choice.replicas:8} {each:>8} {tbt:>10} {mark}{choice.name}")
        lines.append("(*: none is both cheaper and quicker; ~: searched coarsely: it would not be cheaper at best)")
    if rejected:
        lines += ["", "rejected:"]
        lines += [f"  {choice.name}: {choice.reason}" for choice in rejected[:_SHOWN]]
        if len(rejected) > _SHOWN:
            lines.append(f"  ... and {len(rejected) - _SHOWN} more (--out keeps them all)")
    lines.append("")
    if best is None:
        lines.append(f"nothing serves {asked}: the reasons are above; a slower SLO, other devices or budgets may")
    else:
        lines.append(
            f"{asked}: {best.replicas} x [{best.name}], ${best.cost:.2f}/h; each serves {best.capacity:.3g} requests/s"
        )
    return "\n".join(lines)


def _write(answer: Plan, options: Options, folder: Path, source: str) -> None:
    from sarathi_jax.telemetry import plots

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {**dataclasses.asdict(choice), "budget": choice.budget or "slo", "cost": choice.cost}
        for choice in answer.choices
    ]
    best = answer.best
    document = {
        "demand": dataclasses.asdict(answer.demand),
        "lengths": source,
        "prices": {name: options.prices[name] for name in options.devices},
        "best": None if best is None else best.name,
        "front": [choice.name for choice in answer.front],
        "choices": rows,
    }
    (folder / "plan.json").write_text(json.dumps(finite(document), indent=1) + "\n", encoding="utf-8")
    write_rows(folder / "choices.csv", rows)
    points = [
        plots.Choice(
            choice.name.replace("budget ", ""),
            choice.cost,
            1e3 * choice.p99_tbt_s,
            "chosen" if choice is best else "possible",
        )
        for choice in answer.choices
        if choice.is_possible and math.isfinite(choice.p99_tbt_s)
    ]
    try:
        plots.pareto(
            points,
            folder / "pareto.svg",
            cost=f"dollars an hour for {answer.demand.rate:g} requests/s",
            value="P99 time between tokens [ms]",
            higher_is_better=False,
        )
    except plots.PlotError as error:
        logging.warning("%s", error)
    print(f"written to {folder}")
