"""The roofline against the published measurements it was fitted to, against those left out, and by hand.

The measurements are no part of the project: where they are missing, these tests are skipped.
"""

import dataclasses
import statistics
from pathlib import Path

import numpy as np
import pytest

from sarathi_jax.config import ModelConfig, read_yaml
from sarathi_jax.latency import Work, chunk_keys, devices, fit
from sarathi_jax.latency.devices import DEVICES, PUBLISHED_STACK, HostTerm, Kernels, Link
from sarathi_jax.latency.roofline import Gemm, Roofline, gemm_s, layer_gemms
from sarathi_jax.weights.hf_config import model_config_from_hf

REPO = Path(__file__).resolve().parents[2]
DATA = REPO.parent / "shared" / "data"
OSDI = "yi34b_tp2"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"needs the published measurements in {DATA.name}")

CELLS = [
    (model, tp)
    for model in ("Llama-2-7b-hf_mlp", "CodeLlama-34b-Instruct-hf_mlp", "Llama-2-70b-hf_mlp")
    for tp in (1, 2, 4, 8)
]


def model(name: str) -> ModelConfig:
    return model_config_from_hf(read_yaml(REPO / "configs" / "models" / f"{name}.yaml")["config"])


def layer_times(device: str) -> list[fit.LayerTime]:
    folder = DATA / "vidur" / "compute" / device.split("-")[0]
    return [time for path in sorted(folder.glob("*.csv")) for time in fit.read_layer_times(path)]


def mean_error(times: list[fit.LayerTime], device: str, kernels: Kernels) -> float:
    seconds = np.array([time.gemm_s for time in times])
    return float(np.mean(np.abs(fit.layer_errors(fit.stack_gemms(times), seconds, DEVICES[device], kernels))))


def published_stack() -> Roofline:
    return Roofline(model("yi-34b"), DEVICES["a100-80gb"], tp=2, host=PUBLISHED_STACK)


def seconds(roofline: Roofline, iteration: fit.Iteration) -> float:
    return sum(map(roofline.work_s, iteration.works))


@needs_data
@pytest.mark.parametrize("device", ["a100-80gb", "a40"])
def test_four_gemms_of_a_layer_as_measured(device):
    assert mean_error(layer_times(device), device, DEVICES[device].kernels) <= 0.05


@needs_data
@pytest.mark.parametrize("device", ["a100-80gb", "a40"])
def test_constants_are_what_the_fit_finds(device):
    fitted = fit.fit_kernels(layer_times(device), DEVICES[device])
    for field in dataclasses.fields(Kernels):
        found, kept = getattr(fitted, field.name), getattr(DEVICES[device].kernels, field.name)
        np.testing.assert_allclose(found, kept, rtol=0.02, err_msg=field.name)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("device", ["a100-80gb", "a40"])
def test_a_model_and_a_tp_degree_left_out(device):
    """Neither any time of the model nor any time at the degree is seen by the fit."""
    times = layer_times(device)
    for name, tp in CELLS:
        kernels = fit.fit_kernels([t for t in times if t.model != name and t.tp != tp], DEVICES[device])
        left_out = [t for t in times if (t.model, t.tp) == (name, tp)]
        assert mean_error(left_out, device, kernels) <= 0.08, (name, tp)


@needs_data
@pytest.mark.parametrize("files", [["table_2"], ["figure_2"], ["table_2", "figure_2"]])
def test_iterations_of_the_published_stack(files):
    paths = [path for name in files for path in sorted((DATA / "osdi").glob(f"{name}_*.csv"))]
    iterations = [iteration for path in paths for iteration in fit.read_iterations(path, context=1024)]
    stack = published_stack()
    errors = [abs(seconds(stack, iteration) / iteration.seconds - 1) for iteration in iterations]
    assert len(errors) >= 3
    assert statistics.median(errors) <= 0.10


@needs_data
def test_chunking_overhead_of_the_published_stack():
    """Up to 8k. At 16k chunks were quicker than the whole, 0.81 of its time at the least: the attention of the measured
    stack is slower on a long prompt at once, by more than the masked pairs that the host term counts."""
    prefills = fit.read_prefills(DATA / "osdi" / f"figure_9a_{OSDI}_chunking_overhead.csv")
    stack = published_stack()
    whole = {length: iteration for length, chunk_size, iteration in prefills if chunk_size >= length}
    compared = [(length, chunk_size, it) for length, chunk_size, it in prefills if length < 9000]
    assert len(compared) == 12
    for length, chunk_size, iteration in compared:
        measured = iteration.seconds / whole[length].seconds
        ours = seconds(stack, iteration) / seconds(stack, whole[length])
        assert abs(ours - measured) <= 0.1, (length, chunk_size, ours, measured)


@needs_data
def test_host_term_is_as_good_as_what_the_fit_finds():
    iterations = [
        it for path in sorted((DATA / "osdi").glob("figure_2_*.csv")) for it in fit.read_iterations(path, 1024)
    ]
    prefills = fit.read_prefills(DATA / "osdi" / f"figure_9a_{OSDI}_chunking_overhead.csv")
    iterations = [it for it in iterations if it.works[0].num_tokens < 9000]
    iterations += [it for length, _, it in prefills if length < 9000]
    bare = published_stack().with_host(HostTerm())

    def error(host: HostTerm) -> float:
        stack = bare.with_host(host)
        return statistics.mean(abs(seconds(stack, it) / it.seconds - 1) for it in iterations)

    # Few times and a flat valley: the constants themselves are less certain than what they give.
    assert error(PUBLISHED_STACK) <= 1.02 * error(fit.fit_host(iterations, bare))


@needs_data
@pytest.mark.parametrize(
    ("file", "group", "link"),
    [
        ("all_reduce_a100_pairwise_nvlink", (2, 2), "NVLINK_PAIR"),
        ("all_reduce_a100_pairwise_nvlink", (4, 4), "NVLINK_PAIRS"),
        ("all_reduce_a100_dgx", (4, 4), "NVSWITCH"),
        ("all_reduce_a100_dgx", (8, 4), "TWO_NODES"),
        ("send_recv_a100_dgx", (2, 1), "ETHERNET_100G"),
        ("send_recv_a40_pairwise_nvlink", (2, 2), "A40_SEND"),
    ],
)
def test_links_are_what_the_fit_finds(file, group, link):
    messages = fit.read_messages(DATA / "vidur" / f"{file}.csv", *group)
    found = fit.fit_link(messages, group[0] if file.startswith("all_reduce") else None)
    assert found.bandwidth == pytest.approx(getattr(devices, link).bandwidth, rel=0.02)
    assert found.latency_s == pytest.approx(getattr(devices, link).latency_s, rel=0.1)


def test_a_product_by_hand():
    device = dataclasses.replace(DEVICES["a100-80gb"], peak_flops=1e12, bandwidth=1e9)
    kernels = Kernels(flops=0.5, bytes=0.25, launch_s=1e-6, sharpness=2.0, tile=128, tile_share=1.0)
    flops_s = 2 * 256 * 64 * 32 / 1e12 / 0.5  # 130 rows take two tiles
    bytes_s = 2 * (130 * 64 + 64 * 32 + 130 * 32) / 1e9 / 0.25
    assert gemm_s(Gemm(130, 64, 32), device, kernels) == pytest.approx((flops_s**2 + bytes_s**2) ** 0.5 + 1e-6)


def test_a_layers_products_hold_its_weights():
    yi = model("yi-34b")
    for tp in (1, 2, 4):
        weights = sum(gemm.k * gemm.n for gemm in layer_gemms(yi, tp, 1)) * tp * yi.num_layers
        # The rest is embedding and logits.
        assert weights + 2 * yi.vocab_size * yi.hidden_size == pytest.approx(34.4e9, rel=0.01)
    falcon = model("falcon-180b")
    assert sum(gemm.k * gemm.n for gemm in layer_gemms(falcon, 4, 1)) * 4 * 80 == pytest.approx(178e9, rel=0.02)


def test_more_work_takes_longer():
    roofline = Roofline(model("mistral-7b"), DEVICES["a100-80gb"])
    decodes = Work(32, 32, 32 * 1024, 0, 32)
    longer = dataclasses.replace(decodes, num_decode_keys=32 * 2048)
    mixed = Work(512, 32, 32 * 1024, chunk_keys(0, 480), 33)
    times = [roofline.work_s(work) for work in (decodes, longer, mixed)]
    assert times == sorted(times)
    # 14.2 GB of weights and 4.3 GB of keys and values are read once, at 2.04 TB/s and somewhat less.
    assert 9.1e-3 < times[0] < 14e-3


def test_a_window_bounds_what_is_read():
    mistral = model("mistral-7b")
    roofline = Roofline(mistral, DEVICES["a100-80gb"])
    at_window, beyond = (Work(8, 8, 8 * keys, 0, 8) for keys in (4096, 16384))
    assert roofline.work_s(beyond) == roofline.work_s(at_window)
    everything = Roofline(dataclasses.replace(mistral, windows=(None,) * 32), DEVICES["a100-80gb"])
    assert everything.work_s(beyond) > everything.work_s(at_window)


def test_devices_share_the_work():
    llama, a40 = model("llama2-70b"), DEVICES["a40"]
    work = Work(512, num_prefill_keys=chunk_keys(0, 512))
    one, two = Roofline(llama, a40, tp=4), Roofline(llama, a40, tp=4, pp=2)
    assert two.pp_layers == (40, 40)
    assert two.stage_s(work, 0) + two.stage_s(work, 1) == pytest.approx(one.stage_s(work), rel=0.02)
    assert two.work_s(work) > two.stage_s(work, 1)
    assert one.send_s(512) == 0
    uneven = Roofline(llama, a40, tp=4, pp=2, pp_layers=(30, 50))
    assert uneven.work_s(work) > two.work_s(work)


def test_links_by_hand():
    link = Link(1e-6, 1e9)
    assert link.send_s(1000) == pytest.approx(2e-6)
    assert link.all_reduce_s(1000, 4) == pytest.approx(1e-6 + 1.5e-6)
    assert link.all_reduce_s(1000, 1) == 0


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_a_time(name):
    roofline = Roofline(model("mistral-7b"), DEVICES[name])
    decode, prompt = Work(1, 1, 1024), Work(512, num_prefill_keys=chunk_keys(0, 512))
    assert 0 < roofline.work_s(decode) < roofline.work_s(prompt) < 1000


def test_what_does_not_fit_is_refused(tmp_path):
    yi, a100 = model("yi-34b"), DEVICES["a100-80gb"]
    with pytest.raises(ValueError, match="add up to 60 layers"):
        Roofline(yi, a100, pp=2, pp_layers=(30, 20))
    with pytest.raises(ValueError, match="name the link"):
        Roofline(yi, a100, tp=16)
    path = tmp_path / "times.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(fit.FitError, match=r"times.csv is no such measurement"):
        fit.read_layer_times(path)
    path.write_text("")
    with pytest.raises(fit.FitError, match="no rows"):
        fit.read_iterations(path)


def test_nelder_mead_finds_a_minimum():
    found = fit.nelder_mead(
        lambda x: float((x[0] - 3) ** 2 + 10 * (x[1] + x[0]) ** 2), np.array([1.0, 1.0]), tolerance=1e-12
    )
    np.testing.assert_allclose(found, [3, -3], atol=1e-3)
