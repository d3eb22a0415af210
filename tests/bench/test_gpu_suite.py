"""The GPU suite without a GPU: files that resume, counts of work, the page, and every part in a dry run."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from sarathi_jax.batch import BatchLayout
from sarathi_jax.bench.gpu_suite import attention, capacity, kernels, models, numerics, peers, report, steps
from sarathi_jax.bench.gpu_suite.results import MAX_ATTEMPTS, Results, Skipped
from sarathi_jax.bench.gpu_suite.watch import CUT_OFF, watch
from sarathi_jax.config import CacheConfig
from sarathi_jax.models import ModelFunction
from sarathi_jax.resources import config_path
from sarathi_jax.weights.directory import load_model_yaml


def results_in(folder, part="kernels", **options) -> Results:
    return Results(folder / f"{part}.json", part, dry_run=True, commit="0123abc", **options)


def refuse(*_):
    raise Skipped("not here")


def fail(*_):
    raise RuntimeError("broken")


def rows_of(results: Results, status: str) -> list[dict]:
    return [row for row in results.rows.values() if row["status"] == status]


class TestResults:
    def test_resumes_without_measuring_again(self, tmp_path):
        results_in(tmp_path).measure("a", lambda: {"time_us": 1.0}, kind="decode")
        again = results_in(tmp_path)
        assert again.measure("a", fail)
        assert again.rows["a"] == {"kind": "decode", "time_us": 1.0, "status": "measured", "attempts": 1}

    def test_keeps_reasons_and_tries_failures_again(self, tmp_path):
        results = results_in(tmp_path)
        assert results.measure("skipped", refuse)
        assert results.rows["skipped"]["reason"] == "not here"
        for attempt in range(1, MAX_ATTEMPTS + 1):
            assert not results_in(tmp_path).is_done("failed")
            results = results_in(tmp_path)
            results.measure("failed", fail)
            assert results.rows["failed"]["attempts"] == attempt
        assert results_in(tmp_path).is_done("failed")

    def test_stops_only_when_the_device_is_lost(self, tmp_path):
        assert results_in(tmp_path).measure("a", fail)
        assert not results_in(tmp_path, is_alive=lambda: False).measure("b", fail)

    def test_what_did_not_end_is_known_to_the_next_run(self, tmp_path):
        def interrupted():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            results_in(tmp_path).measure("a", interrupted)
        assert results_in(tmp_path).rows["a"]["status"] == "started"
        assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]

    def test_refuses_the_file_of_another_part(self, tmp_path):
        results_in(tmp_path).measure("a", refuse)
        with pytest.raises(ValueError, match="holds part 'kernels'"):
            Results(tmp_path / "kernels.json", "numerics", dry_run=True)


class TestWatch:
    WORKER = (
        "import pathlib, sys; path = pathlib.Path(sys.argv[1]); n = len(path.read_text()) if path.exists() else 0; "
    )

    def run(self, code, path, **limits):
        return watch([sys.executable, "-c", self.WORKER + code, str(path)], path, **limits)

    def test_restarts_what_ends_badly_as_long_as_rows_come(self, tmp_path):
        code = "path.write_text('x' * (n + 1)); sys.exit(0 if n == 2 else 9)"
        assert self.run(code, tmp_path / "rows", limit_s=30, row_limit_s=30) == 0
        assert (tmp_path / "rows").read_text() == "xxx"

    def test_stops_what_gets_nowhere(self, tmp_path):
        assert self.run("sys.exit(9)", tmp_path / "rows", limit_s=30, row_limit_s=30) == 9

    def test_kills_what_hangs(self, tmp_path):
        code = "import time; time.sleep(60)"
        assert self.run(code, tmp_path / "rows", limit_s=30, row_limit_s=0.3) == CUT_OFF
        assert self.run(code, tmp_path / "rows", limit_s=0.3, row_limit_s=30) == CUT_OFF


def test_names_of_workloads_are_keys():
    names = [workload.name for workload in attention.workloads(dry_run=False)]
    assert len(set(names)) == len(names) > 30
    for workload in attention.workloads(dry_run=False):
        assert sum(length for length, _ in workload.chunks) <= workload.shape.num_tokens
        assert len(workload.chunks) <= workload.shape.num_sequences
        assert max(kv_len for _, kv_len in workload.chunks) <= workload.shape.max_kv


def test_counts_visible_pairs():
    for length, kv_len in ((1, 1), (1, 9), (4, 4), (3, 10)):
        assert attention.visible_pairs(length, kv_len) == sum(range(kv_len - length + 1, kv_len + 1))


@pytest.mark.parametrize("name", models.SETTINGS)
def test_steps_fit_their_buckets(name):
    setting = models.SETTINGS[name]
    for _, bucket, _, chunks in models.step_cases(setting):
        assert sum(length for length, _ in chunks) == bucket
        assert len(chunks) <= min(bucket, setting.max_num_seqs)
        assert all(length <= kv_len < setting.max_model_len for length, kv_len in chunks)


def test_fills_a_step_as_the_engine_would():
    cache = CacheConfig(num_blocks=20, block_size=16, max_model_len=64)
    layout = BatchLayout(8, 4, cache)
    batch = layout.unpack(steps.fill_buffer(layout, cache, 4, ((1, 33), (1, 40), (5, 20)), vocab_size=50))
    assert batch.chunk_starts.tolist() == [0, 1, 2, 7, 7]
    assert batch.kv_lens.tolist() == [33, 40, 20, 0]
    assert batch.positions.tolist() == [32, 39, 15, 16, 17, 18, 19, 0]
    assert batch.token_rows.tolist() == [0, 1, 2, 2, 2, 2, 2, 4]
    assert (int(batch.num_decodes[0]), int(batch.num_chunks[0])) == (2, 3)
    used = [batch.block_tables[s, : -(-kv_len // 16)].tolist() for s, kv_len in enumerate((33, 40, 20))]
    assert len({block for ids in used for block in ids}) == sum(map(len, used))
    assert batch.write_indices[1] == used[1][39 // 16] * 16 + 39 % 16
    assert batch.write_indices[7] == 20 * 16
    with pytest.raises(Skipped, match="needs 24 blocks of the cache, which has 20"):
        steps.fill_buffer(layout, cache, 4, ((1, 63),) * 6, vocab_size=50)


def test_work_of_a_step():
    """Mistral-7B: 7.1e9 weights in products; a decode at KV 1000 reads 131072 bytes a token of its context."""
    model = load_model_yaml(config_path("models", "mistral-7b"))
    shapes = ModelFunction(model, np.dtype("bfloat16")).shapes
    params = {path: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for path, leaf in shapes.items()}
    num_bytes, flops = steps.step_work(model, params, 1, 1, ((1, 1000),))
    weights = 7_241_732_096 - 32000 * 4096
    assert num_bytes == pytest.approx(2 * weights + 131072 * 1001, rel=1e-3)
    assert flops == pytest.approx(2 * weights + 4 * 32 * 4096 * 1000, rel=1e-3)
    inside, beyond = (steps.step_work(model, params, 1, 1, ((1, kv_len),))[0] for kv_len in (4096, 9000))
    assert inside == beyond


def test_peers_that_are_not_there_are_skipped_with_a_reason(tmp_path):
    results = results_in(tmp_path, "kernels-torch")
    assert peers.run_torch(results, sys.executable, 60, dry_run=True)
    assert all("torch" in row["reason"] for row in rows_of(results, "skipped"))
    assert len(rows_of(results, "skipped") + rows_of(results, "measured")) == 2
    too_large = results_in(tmp_path, "peer-llama2-70b-w8")
    cases = models.SETTINGS["llama2-70b-w8"].throughput_cases(dry_run=False)
    assert peers.run_transformers(too_large, sys.executable, "llama2-70b", cases, True, 60)
    assert len(rows_of(too_large, "skipped")) == len(cases)


def test_keeps_the_rows_of_a_peer(tmp_path, monkeypatch):
    line = {"key": "attention torch decode T24 S4 H4 G2 D64 K16 KV40", "time_us": 3.0}
    script = tmp_path / "torch_attention.py"
    script.write_text(f"print({json.dumps(json.dumps(line))})")
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "peers.py"))
    results = results_in(tmp_path)
    assert not peers.run_torch(results, sys.executable, 60, dry_run=True)
    assert [row["time_us"] for row in rows_of(results, "measured")] == [3.0]
    assert [row["reason"] for row in rows_of(results, "failed")]


def test_counts_weights_of_a_config():
    config = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    count = peers.num_weights(config | {"num_hidden_layers": 32, "vocab_size": 32000})
    assert count == pytest.approx(7_241_732_096, rel=1e-3)


def test_page_says_dry_run_and_why_rows_are_missing(tmp_path):
    results = results_in(tmp_path)
    for backend, percent in (("triton", 50.0), ("xla", 10.0)):
        row = {"time_us": 9.0, "percent_of_bandwidth": percent, "host_bound": False}
        results.measure(backend, lambda row=row: row, kind="decode", backend=backend, workload="decode one")
    results.measure("absent", refuse)
    served = {"policy": "sarathi", "slo_s": 0.1, "p50_ttft_s": 0.2, "median_delay_s": 0.1, "output_tok_s": 300.0}
    for rate, p99_tbt_s in ((2.0, 0.05), (4.0, 0.15)):
        row = {**served, "rate": rate, "p99_tbt_s": p99_tbt_s, "keeps_promise": p99_tbt_s <= 0.1}
        results.measure(f"capacity {rate}", lambda row=row: row, kind="capacity")
    page = report.write_page(tmp_path).read_text()
    for text in ("**DRY RUN", "CPU (dry run)", "0123abc", "| decode one | 9.0 (50 %) | 9.0 (10 %) |", "not here"):
        assert text in page
    assert "a P99 TBT of 100 ms: sarathi 2/s." in page
    assert "| sarathi | 4 | 0.200 | 150.0 | 0.100 | 300 | no |" in page
    assert "DRY RUN" in (tmp_path / "gpu-suite-decode.svg").read_text()


def test_page_refuses_to_mix_devices(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        report.write_page(tmp_path)
    results_in(tmp_path).measure("a", refuse)
    other = json.loads((tmp_path / "kernels.json").read_text())
    other["header"] |= {"dry_run": False, "device": "NVIDIA H200"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="several devices"):
        report.write_page(tmp_path)


@pytest.fixture
def quick_compiles():
    """What is compiled here runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.usefixtures("quick_compiles")
def test_dry_run_of_everything(tmp_path):
    """Each part once; kernels interpreted, except the slowest of them where another part runs it."""
    assert numerics.run(results_in(tmp_path, "numerics"), ("triton", "mosaic_gpu", "xla"), dry_run=True)
    assert kernels.run(results_in(tmp_path, "kernels"), ("triton", "xla"), dry_run=True)
    setting = models.SETTINGS["llama2-70b-w8"]
    assert models.run(results_in(tmp_path, "model-llama2-70b-w8"), setting, ("xla",), 16, dry_run=True)
    page = report.write_page(tmp_path).read_text()
    for part in ("numerics", "kernels", "model-llama2-70b-w8"):
        rows = json.loads((tmp_path / f"{part}.json").read_text())["rows"]
        assert not [row for row in rows.values() if row["status"] not in ("measured", "skipped")], rows
        assert all(math.isfinite(row["time_us"]) for row in rows.values() if "time_us" in row)
        assert all(row["ok"] for row in rows.values() if "ok" in row)
        assert f"| {part} |" in page


@pytest.mark.slow
def test_command(tmp_path, repo):
    for part in ("capacity", "merge"):
        command = [sys.executable, "-m", "sarathi_jax.bench.gpu_suite", "--part", part, "--out", str(tmp_path)]
        done = subprocess.run([*command, "--dry_run"], cwd=repo, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
    page = (tmp_path / "gpu-suite.md").read_text()
    assert "Not measured" not in page
    for policy in capacity.POLICIES:
        assert f"| {policy} | 20 |" in page
