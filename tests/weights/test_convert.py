"""`convert`: both ways, everything that travels along, and nothing half done."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from sarathi_jax.config import ConfigError
from sarathi_jax.weights import directory as directory_module
from sarathi_jax.weights import orbax, safetensors
from sarathi_jax.weights.convert import convert
from sarathi_jax.weights.directory import load_model_config
from sarathi_jax.weights.safetensors import WeightsError


def snapshot(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["mistral", "falcon-gqa"])
def test_there_and_back(make_checkpoint, family, tmp_path):
    checkpoint = make_checkpoint(family)
    (checkpoint.directory / "tokenizer.json").write_text("{}")
    (checkpoint.directory / "README.md").write_text("not copied")
    before = snapshot(checkpoint.directory)
    convert(checkpoint.directory, tmp_path / "deep" / "orbax", "orbax", progress=False)
    convert(tmp_path / "deep" / "orbax", tmp_path / "back", "hf", progress=False)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == checkpoint.tensors.keys()
    assert all(np.array_equal(back[name], checkpoint.tensors[name]) for name in back)
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields == checkpoint.fields | {"torch_dtype": "float32"}
    assert load_model_config(tmp_path / "back") == checkpoint.config
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert snapshot(checkpoint.directory) == before


def test_dtype(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(dtype=np.float16)
    convert(checkpoint.directory, tmp_path / "exact", "hf", progress=False)
    assert load_file(tmp_path / "exact" / "model.safetensors")["model.norm.weight"].dtype == np.float32
    convert(checkpoint.directory, tmp_path / "half", "hf", dtype="bfloat16", shard_bytes=20_000, progress=False)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "half" / "model.safetensors.index.json").exists()


def test_refused_targets(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "precious").write_text("kept")
    for target in (occupied, occupied / "precious", checkpoint.directory):
        with pytest.raises(WeightsError, match="not an empty directory"):
            convert(checkpoint.directory, target, "orbax")
    assert snapshot(occupied) == {"precious": b"kept"}
    with pytest.raises(ConfigError, match="'gguf' is not one of hf, orbax"):
        convert(checkpoint.directory, tmp_path / "new", "gguf")
    (tmp_path / "empty").mkdir()
    convert(checkpoint.directory, tmp_path / "empty", "hf", progress=False)
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_bad_source_leaves_nothing(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    path = checkpoint.directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="truncated"):
        convert(checkpoint.directory, tmp_path / "out", "orbax", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.directory.name]


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("target_format", ["hf", "orbax"])
def test_disk_full_while_writing(make_checkpoint, tmp_path, monkeypatch, target_format):
    checkpoint = make_checkpoint()
    before = snapshot(checkpoint.directory)
    monkeypatch.setattr(safetensors, "write_file", full_disk)
    monkeypatch.setattr(orbax, "write", full_disk)
    with pytest.raises(WeightsError, match=r"disk of .* is full.*source is untouched"):
        convert(checkpoint.directory, tmp_path / "out", target_format, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.directory.name]
    assert snapshot(checkpoint.directory) == before


def test_disk_too_small_is_known_beforehand(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = make_checkpoint()
    usage = directory_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(directory_module.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(WeightsError, match=r"0\.00 GB free, out needs"):
        convert(checkpoint.directory, tmp_path / "out", "hf", progress=False)
    assert not (tmp_path / "out").exists()


_CONVERT = """
import shutil, sys
from sarathi_jax.weights.convert import convert
usage = shutil.disk_usage(sys.argv[2])._replace(free=10**9)  # so that nothing is known beforehand
shutil.disk_usage = lambda _path: usage
convert(sys.argv[1], sys.argv[2] + "/out", sys.argv[3], progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target_format", ["hf", "orbax"])
def test_a_disk_that_is_really_full(make_checkpoint, tmp_path, repo, target_format):
    """On a file system of 64 KiB, in a process of its own: Orbax's threads complain aloud, each in its own words."""
    checkpoint = make_checkpoint()
    before = snapshot(checkpoint.directory)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(mounting, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        arguments = [sys.executable, "-c", _CONVERT, str(checkpoint.directory), str(disk), target_format]
        process = subprocess.run(arguments, cwd=repo, capture_output=True, text=True)
        assert process.returncode == 1
        last_line = process.stderr.strip().splitlines()[-1]
        assert "WeightsError: the disk of " in process.stderr, last_line
        assert "what was half written is removed and the source is untouched" in process.stderr
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert snapshot(checkpoint.directory) == before
