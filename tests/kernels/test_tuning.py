"""The search for tunings, with times made up and kernels interpreted, and the tables that it leaves."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

from pallas_kernels import tune
from pallas_kernels.ragged_paged_attention import BACKENDS, mosaic_gpu, ragged_paged_attention, triton, tuning
from pallas_kernels.ragged_paged_attention.cases import draw_cache, draw_chunks
from pallas_kernels.ragged_paged_attention.tuning import Problem

PROBLEM = Problem(
    num_tokens=8, num_sequences=4, heads=4, kv_heads=2, head_dim=64, block_size=16, max_keys=64, dtype="float32"
)
KERNELS = [name for name, backend in BACKENDS.items() if backend.platform is not None]


def entry_of(num_tokens: int, **fields) -> dict:
    problem = dataclasses.replace(PROBLEM, num_tokens=num_tokens)
    return {"backend": "triton", "problem": dataclasses.asdict(problem), "tuning": fields}


def write_table(folder, *entries) -> None:
    tuning.table_path("NVIDIA H200", folder).write_text(json.dumps({"entries": entries}))


class TestSearch:
    def test_finds_the_best_of_each_field(self):
        def seconds(candidate):
            return 1 + abs(candidate.stages - 4) + (candidate.step_keys == 128) + 2 * candidate.take_turns

        choices = {"step_keys": (64, 128), "stages": (2, 4, 8), "take_turns": (True, False)}
        best, best_s, heuristic_s = tune.search(mosaic_gpu.Tuning(), choices, seconds)
        assert best == mosaic_gpu.Tuning(step_keys=64, stages=4, take_turns=False)
        assert (best_s, heuristic_s) == (1, 6)

    def test_keeps_the_heuristic_when_others_are_hardly_faster_or_fail(self):
        heuristic = mosaic_gpu.Tuning()
        times = {2: 1.0, 3: 0.99, 4: math.inf}
        best, _, _ = tune.search(heuristic, {"stages": (3, 4)}, lambda candidate: times[candidate.stages])
        assert best == heuristic

    def test_passes_over_what_the_tuning_itself_refuses(self):
        best, _, _ = tune.search(mosaic_gpu.Tuning(), {"step_keys": (96,)}, lambda _: 1.0)
        assert best.step_keys == 128


class TestTable:
    def test_the_nearest_number_of_tokens_is_taken(self, tmp_path):
        write_table(tmp_path, entry_of(8, tile_rows=16), entry_of(512, tile_rows=64))
        for num_tokens, rows in ((1, 16), (32, 16), (128, 64), (2048, 64)):
            problem = dataclasses.replace(PROBLEM, num_tokens=num_tokens)
            assert tuning.look_up("NVIDIA H200", "triton", problem, tmp_path) == {"tile_rows": rows}

    @pytest.mark.parametrize("change", [{"heads": 8}, {"head_dim": 128}, {"block_size": 32}, {"dtype": "bfloat16"}])
    def test_other_shapes_have_none(self, tmp_path, change):
        write_table(tmp_path, entry_of(8, tile_rows=16))
        problem = dataclasses.replace(PROBLEM, **change)
        assert tuning.look_up("NVIDIA H200", "triton", problem, tmp_path) is None
        assert tuning.look_up("NVIDIA H200", "mosaic_gpu", PROBLEM, tmp_path) is None
        assert tuning.look_up("NVIDIA A100-SXM4-80GB", "triton", PROBLEM, tmp_path) is None

    def test_a_broken_table_is_named(self, tmp_path):
        tuning.table_path("NVIDIA H200", tmp_path).write_text("{")
        with pytest.raises(ValueError, match=r"nvidia_h200\.json is not a table of tunings .* make it anew"):
            tuning.look_up("NVIDIA H200", "triton", PROBLEM, tmp_path)

    def test_a_run_that_was_stopped_goes_on(self, tmp_path):
        path, wanted = tmp_path / "new" / "gpu.json", [("triton", PROBLEM), ("mosaic_tpu", PROBLEM)]
        asked = []

        def measure(backend, problem):
            asked.append(backend)
            if asked == ["triton", "mosaic_tpu"]:
                raise KeyboardInterrupt
            return {"backend": backend, "problem": dataclasses.asdict(problem), "tuning": {}}

        with pytest.raises(KeyboardInterrupt):
            tune.fill_table(path, "gpu", wanted, measure)
        tune.fill_table(path, "gpu", wanted, measure)
        assert asked == ["triton", "mosaic_tpu", "mosaic_tpu"]
        assert [entry["backend"] for entry in tuning.read_entries(path)] == ["triton", "mosaic_tpu"]

    def test_committed_tables_fit_their_kernels(self):
        for path in tuning.FOLDER.glob("*.json"):
            for entry in tuning.read_entries(path):
                BACKENDS[entry["backend"]].module.Tuning(**entry["tuning"])
                Problem(**entry["problem"])


@pytest.mark.parametrize("backend", KERNELS)
def test_choices_are_fields(backend):
    module = BACKENDS[backend].module
    fields = {field.name for field in dataclasses.fields(module.Tuning)}
    assert set(module.CHOICES) <= fields
    assert dataclasses.asdict(module.choose_tuning(PROBLEM)).keys() == fields


@pytest.mark.slow
def test_what_was_tuned_is_what_runs(tmp_path, monkeypatch):
    entry = tune.tune("triton", PROBLEM, interpret=True, choices={"tile_rows": (32, 16), "tile_keys": (16,)})
    assert entry["time_us"] > 0
    assert entry["problem"] == dataclasses.asdict(PROBLEM)

    tuned = dataclasses.asdict(dataclasses.replace(triton.choose_tuning(PROBLEM), tile_rows=16, decode_splits=2))
    write_table(tmp_path, {**entry, "tuning": tuned})
    monkeypatch.setattr(tuning, "look_up", functools.partial(tuning.look_up, folder=tmp_path))
    q, k, v, *chunks = draw_chunks(PROBLEM, tune.chunks_of(PROBLEM))

    def program(device_kind):
        options = {"scale": 1.0, "backend": "triton", "interpret": True, "device_kind": device_kind}
        call = functools.partial(ragged_paged_attention, **options)
        return str(jax.make_jaxpr(call)(q, k, v, draw_cache(PROBLEM), *chunks))

    assert program("NVIDIA H200") != program(None)
    assert program("NVIDIA A100") == program(None)


@pytest.mark.slow
def test_a_cut_with_another_result_is_left_out(capsys):
    bench = tune.Bench("triton", PROBLEM, interpret=True)
    heuristic = triton.choose_tuning(PROBLEM)
    assert bench.measure(heuristic) < math.inf
    bench._expected = np.asarray(bench._expected) + 1
    assert bench.measure(dataclasses.replace(heuristic, tile_rows=16)) == math.inf
    assert "its result differs from the heuristic's" in capsys.readouterr().err
