"""Devices as files, and the verb that fits them to measured times."""

import dataclasses

import numpy as np
import pytest

from sarathi_jax.cli import main
from sarathi_jax.latency import DEVICES, DeviceError, device_of, load_device, save_device
from sarathi_jax.latency.roofline import Gemm, gemm_s

A40 = DEVICES["a40"]


@pytest.fixture
def products(tmp_path):
    """Times of a device that reaches other shares of its peaks than the A40."""
    kernels = dataclasses.replace(A40.kernels, flops=0.6, bytes=0.7, launch_s=1e-5, by_tokens=())
    rows = ["m,k,n,ms"]
    for m in (1, 16, 64, 128, 256, 512, 1024, 4096):
        for k, n in ((4096, 12288), (4096, 4096), (11008, 4096)):
            rows.append(f"{m},{k},{n},{1e3 * gemm_s(Gemm(m, k, n), A40, kernels)}")
    path = tmp_path / "products.csv"
    path.write_text("\n".join(rows))
    return path


def status(*arguments) -> int:
    return main(["main.py", "calibrate", *map(str, arguments)])


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_is_the_same_after_it_was_a_file(name, tmp_path):
    save_device(DEVICES[name], tmp_path / "device.yaml")
    assert load_device(tmp_path / "device.yaml") == DEVICES[name] == device_of(name)
    assert device_of(str(tmp_path / "device.yaml")) == DEVICES[name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("peak_flops:", "peak_flop:"),
        ("bandwidth: 696000000000.0", "bandwidth: wide"),
        ("bandwidth: 696000000000.0", "bandwidth: -1"),
        ("kernels:", "kernel:"),
        ("  flops: 0.784", "  flop: 0.784"),
        ("- devices: 2", "- device: 2"),
        ("name: a40", "- a40"),
    ],
)
def test_a_file_that_describes_no_device_is_told(old, new, tmp_path):
    path = tmp_path / "device.yaml"
    save_device(A40, path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DeviceError, match=r"device\.yaml"):
        load_device(path)


def test_times_of_products_give_back_the_kernels(products, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    assert status("--products", products, "--device=a40", "--name=mine", "--peak_tflops=149.7", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "mean error" in printed
    assert "4096" in printed
    device = load_device(out)
    assert (device.name, device.fitted, device.links) == ("mine", True, A40.links)
    for m in (32, 700, 2048):
        gemm = Gemm(m, 4096, 8192)
        wanted = dataclasses.replace(A40.kernels, flops=0.6, bytes=0.7, launch_s=1e-5, by_tokens=())
        assert gemm_s(gemm, device, device.kernels) == pytest.approx(gemm_s(gemm, A40, wanted), rel=0.05)


def test_times_of_messages_give_back_the_links(tmp_path):
    sizes = np.geomspace(1e3, 1e9, 12)
    for name, times in (("sum", [20e-6 + 1.5 * n / 1e11 for n in sizes]), ("send", [9e-6 + n / 2e10 for n in sizes])):
        rows = [f"{n},{1e3 * seconds}" for n, seconds in zip(sizes, times, strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["bytes,ms", *rows]))
    files = ("--all_reduce", tmp_path / "sum.csv", "--send", tmp_path / "send.csv", "--out", tmp_path / "d.json")
    assert status("--device=h100", "--num_devices=4", *files) == 0
    device = load_device(tmp_path / "d.json")
    assert device.link(4).bandwidth == pytest.approx(1e11, rel=0.01)
    assert device.send.latency_s == pytest.approx(9e-6, rel=0.02)
    assert device.link(8) == DEVICES["h100"].link(8)


def test_vidurs_layout_is_read(shared, capsys):
    folder = shared / "data" / "vidur"
    name = folder / "all_reduce_a100_dgx.csv"
    assert status("--device=a100-80gb", "--all_reduce", name, "--num_devices=4") == 0
    assert "mean error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "number", "words"),
    [
        ((), 2, "nothing to fit to"),
        (("--products=p.csv",), 2, "--device is missing"),
        (("--products=p.csv", "--device=b300"), 1, "a100-80gb"),
        (("--products=nowhere.csv", "--device=a40"), 1, "nowhere.csv"),
        (("--products=BAD", "--device=a40"), 1, "bad.csv"),
        (("--products=NEGATIVE", "--device=a40"), 1, "above 0"),
        (("--products=EMPTY", "--device=a40"), 1, "no rows"),
        (("--all_reduce=BAD", "--device=a40"), 2, "--num_devices"),
        (("--all_reduce=BAD", "--device=a40", "--num_devices=1"), 2, "at least 2"),
        (("--all_reduce=BAD", "--device=a40", "--num_devices=2"), 1, "bad.csv"),
        (("--send=BAD", "--device=a40", "--peak_tflops=0"), 2, "--peak_tflops"),
        (("more",), 2, "unexpected"),
    ],
)
def test_what_cannot_be_fitted_is_told_in_a_line(arguments, number, words, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "negative.csv").write_text("m,k,n,ms\n1,2,3,-1\n")
    (tmp_path / "empty.csv").write_text("m,k,n,ms\n")
    for name in ("bad", "negative", "empty"):
        arguments = [argument.replace(name.upper(), str(tmp_path / f"{name}.csv")) for argument in arguments]
    assert status(*arguments) == number
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
