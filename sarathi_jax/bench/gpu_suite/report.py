"""All JSON files of a folder as one page of Markdown, with plots where matplotlib is installed."""

import collections
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sarathi_jax.bench.gpu_suite.results import write_atomically

Row = Mapping[str, Any]

PAGE = "gpu-suite.md"


def write_page(folder: Path) -> Path:
    """Writes ``gpu-suite.md`` and its plots into the folder of the JSON files.

    Returns:
      The page.

    Raises:
      ValueError: no results there, or those of dry runs and real runs, or of several devices, side by side.
    """
    documents = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if isinstance(document, dict) and {"header", "rows"} <= set(document):
            documents.append((path.stem, document))
    if not documents:
        raise ValueError(f"no results in {folder}: run a part first")
    if len({(d["header"]["device"], d["header"]["dry_run"]) for _, d in documents}) > 1:
        raise ValueError(f"{folder} holds results of several devices, or of dry runs and real ones: part them")
    text = "\n\n".join([*_header(documents), *_sections(documents, folder), *_left_out(documents)])
    write_atomically(folder / PAGE, text + "\n")
    return folder / PAGE


def _header(documents: Sequence[tuple[str, Any]]) -> list[str]:
    header = documents[0][1]["header"]
    lines = ["# GPU suite"]
    if header["dry_run"]:
        lines.append("**DRY RUN: tiny shapes on a CPU, kernels interpreted. No number here is one of a GPU.**")
    lines.append(f"Device: {header['device']}. Made by `python -m sarathi_jax.bench.gpu_suite` (`docs/gpu-suite.md`).")
    cells = []
    for name, document in documents:
        h = document["header"]
        packages = ", ".join(f"{package} {version}" for package, version in h["packages"].items())
        cells.append([name, h["date"], h["commit"], packages, h["xla_flags"] or "-"])
    return [*lines, _table(["part", "date", "commit", "packages", "XLA_FLAGS"], cells)]


def _sections(documents: Sequence[tuple[str, Any]], folder: Path) -> list[str]:
    rows = [
        {**row, "part": name, "dry_run": document["header"]["dry_run"]}
        for name, document in documents
        for row in document["rows"].values()
    ]
    measured = [row for row in rows if row["status"] == "measured"]
    of_kind = collections.defaultdict(list)
    for row in measured:
        of_kind[row.get("kind")].append(row)
    found = []
    if of_kind["roofs"]:
        cells = [
            [r["part"], _tera(r["copy_bytes_s"]), _tera(r["read_bytes_s"]), _tera(r["matrix_flops_s"])]
            for r in of_kind["roofs"]
        ]
        found += ["## Roofs", _table(["part", "copy, TB/s", "read, TB/s", "bf16 product, TFLOP/s"], cells)]
    if of_kind["numerics"] or of_kind["numerics product"]:
        found += ["## Numerics", _numerics(of_kind["numerics"]), _product_numerics(of_kind["numerics product"])]
    for kind, roof in (("decode", "bandwidth"), ("prefill", "matrix_rate"), ("mixed", "roof"), ("product", "roof")):
        if of_kind[kind]:
            title = "8-bit products" if kind == "product" else f"Attention: {kind}"
            found += [
                f"## {title}",
                _by_backend(of_kind[kind], f"percent_of_{roof}"),
                _plot(of_kind[kind], kind, roof, folder),
            ]
    parts = sorted({row["part"] for row in measured if row["part"].startswith("model-")})
    for part in parts:
        found += [f"## {part}", *_model(part, measured)]
    if of_kind["capacity"]:
        found += ["## Capacity of the policies", _capacity(of_kind["capacity"])]
    return [text for text in found if text]


def _numerics(rows: Sequence[Row]) -> str:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["backend"], row["dtype"]].append(row)
    cells = []
    for (backend, dtype), group in groups.items():
        worst = max(group, key=lambda row: (row["error"] != row["error"], row["error"]))
        bad = ", ".join(row["case"] for row in group if not row["ok"]) or "none"
        moving = ", ".join(row["case"] for row in group if not row["repeatable"]) or "none"
        cells.append([backend, dtype, str(len(group)), f"{worst['error']:.2e} ({worst['case']})", bad, moving])
    return _table(["backend", "dtype", "cases", "largest error", "beyond tolerance", "differ between two runs"], cells)


def _product_numerics(rows: Sequence[Row]) -> str:
    cells = [[r["backend"], r["dtype"], r["case"], f"{r['norm_error']:.2e}", str(r["ok"])] for r in rows]
    return _table(["mode", "weights", "product", "error of the norm", "ok"], cells) if cells else ""


def _by_backend(rows: Sequence[Row], share: str) -> str:
    """A row a workload, a column a backend: time and share of the roof."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    times: dict[str, dict[str, str]] = collections.defaultdict(dict)
    roofs = next((row for row in rows if share in row), None)
    for row in rows:
        percent = f" ({row[share]:.0f} %)" if share in row else ""
        mark = " host-bound" if row.get("host_bound") else ""
        times[row["workload"]][row["backend"]] = f"{row['time_us']:.1f}{percent}{mark}"
    note = f"Microseconds ({share.replace('_', ' ')})." if roofs else "Microseconds."
    cells = [[name, *(of.get(backend, "-") for backend in backends)] for name, of in times.items()]
    return f"{note}\n\n{_table(['batch', *backends], cells)}"


def _model(part: str, measured: Sequence[Row]) -> list[str]:
    peer = part.replace("model-", "peer-", 1)
    rows = [row for row in measured if row["part"] in (part, peer)]
    found = []
    columns: dict[str, Callable[[Row], str]] = {
        "backend": lambda r: r["backend"],
        "weights on device, s": lambda r: f"{r['draw_weights_s']:.1f}",
        "cache sized, s": lambda r: f"{r['plan_cache_s']:.1f}",
        "compiled, s": lambda r: f"{r['compile_s']:.1f}",
        "programs": lambda r: str(r["num_programs"]),
        "files in compile cache before": lambda r: str(r["files_in_compile_cache"]),
        "weights, GB": lambda r: f"{r['weight_bytes'] / 1e9:.1f}",
        "cache blocks": lambda r: str(r["cache_blocks"]),
    }
    found.append(_of_kind(rows, "start-up", columns))
    columns = {
        "backend": lambda r: r["backend"],
        "step": lambda r: r["step"],
        "bucket": lambda r: str(r["bucket"]),
        "KV": lambda r: str(r["kv_len"]),
        "ms": lambda r: f"{r['time_us'] / 1e3:.3f}" + (" host-bound" if r["host_bound"] else ""),
        "floor, ms": lambda r: f"{r['floor_us'] / 1e3:.3f}",
        "% of roof": lambda r: f"{r['percent_of_roof']:.0f}",
        "to start, ms": lambda r: f"{r['enqueue_us'] / 1e3:.3f}",
        "tokens/s": lambda r: f"{r['tokens_s']:.0f}",
    }
    found.append(_of_kind(rows, "step", columns))
    columns = {
        "engine": lambda r: "transformers" if r["backend"] == "transformers" else f"sarathi_jax, {r['backend']}",
        "requests x (prompt + output)": lambda r: f"{r['requests']} x ({r['prompt_tokens']} + {r['output_tokens']})",
        "output tok/s": lambda r: f"{r['output_tok_s']:.0f}",
        "total tok/s": lambda r: f"{r['total_tok_s']:.0f}",
        "late compiles": lambda r: str(r.get("late_compiles", "-")),
    }
    found.append(_of_kind(rows, "throughput", columns))
    columns = {"decodes": lambda r: str(r["num_seqs"]), "host time of a step, us": lambda r: f"{r['time_us']:.0f}"}
    found.append(_of_kind(rows, "host", columns))
    return found


def _capacity(rows: Sequence[Row]) -> str:
    """What each load does, and the largest one within the promise."""
    columns: dict[str, Callable[[Row], str]] = {
        "policy": lambda r: r["policy"],
        "requests/s": lambda r: f"{r['rate']:g}",
        "P50 TTFT, s": lambda r: f"{r['p50_ttft_s']:.3f}",
        "P99 TBT, ms": lambda r: f"{1e3 * r['p99_tbt_s']:.1f}",
        "median delay, s": lambda r: f"{r['median_delay_s']:.3f}",
        "output tok/s": lambda r: f"{r['output_tok_s']:.0f}",
        "kept": lambda r: "yes" if r["keeps_promise"] else "no",
    }
    kept = collections.defaultdict[str, float](float)
    for row in rows:
        kept[row["policy"]] = max(kept[row["policy"]], row["rate"] if row["keeps_promise"] else 0.0)
    largest = ", ".join(f"{policy} {rate:g}/s" for policy, rate in kept.items())
    note = f"Largest rate of those tried with a P99 TBT of {1e3 * rows[0]['slo_s']:g} ms: {largest}."
    return f"{note}\n\n{_of_kind(rows, 'capacity', columns)}"


def _of_kind(rows: Sequence[Row], kind: str, columns: Mapping[str, Callable[[Row], str]]) -> str:
    cells = [[column(row) for column in columns.values()] for row in rows if row.get("kind") == kind]
    return _table(list(columns), cells) if cells else ""


def _left_out(documents: Sequence[tuple[str, Any]]) -> list[str]:
    cells = [
        [name, key, row["status"], str(row.get("reason", "did not end")).replace("|", "/").replace("\n", " ")[:200]]
        for name, document in documents
        for key, row in document["rows"].items()
        if row["status"] != "measured"
    ]
    return ["## Not measured", _table(["part", "row", "why", "reason"], cells)] if cells else []


def _plot(rows: Sequence[Row], kind: str, roof: str, folder: Path) -> str:
    """Bars of the share of the roof, one group a batch; nothing without matplotlib."""
    share = f"percent_of_{roof}"
    rows = [row for row in rows if share in row]
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return ""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["workload"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(names) * len(backends)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(backends)
    for i, backend in enumerate(backends):
        of = {row["workload"]: row[share] for row in rows if row["backend"] == backend}
        places = [n + i * height for n, name in enumerate(names) if name in of]
        axes.barh(places, [of[name] for name in names if name in of], height, label=backend)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"% of measured {roof.replace('_', ' ')}" + (" (DRY RUN)" if rows[0]["dry_run"] else ""))
    axes.legend(fontsize=7)
    path = folder / f"gpu-suite-{kind}.svg"
    figure.savefig(path, metadata={"Date": None})
    return f"![{kind}: share of the roof]({path.name})"


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells])


def _tera(value: float) -> str:
    return f"{value / 1e12:.3g}"
