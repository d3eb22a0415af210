import subprocess
import sys
import zipfile

import pytest

from sarathi_jax.resources import ResourceError, checkpoint_path, config_names, config_path, data_path


def test_a_checkout_has_its_files_at_the_top(repo):
    assert data_path("configs") == repo / "configs"
    assert "mistral-7b" in config_names("models")
    assert config_path("models", "mistral-7b").is_file()


def test_a_wrong_name_is_told_the_nearest():
    with pytest.raises(ResourceError, match=r"no models configuration 'mistral7b'; there are .*mistral-7b"):
        config_path("models", "mistral7b")
    with pytest.raises(ResourceError, match="nothing_of_ours"):
        data_path("nothing_of_ours")
    with pytest.raises(ResourceError, match="checkpoint"):
        checkpoint_path("no such model")


@pytest.mark.slow
def test_a_wheel_carries_both_packages_and_their_files(repo, tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=repo, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """if True:
        import pathlib, sarathi_jax.cli, pallas_kernels
        from sarathi_jax.resources import config_path, data_path
        site = pathlib.Path(pallas_kernels.__file__).parent.parent
        assert config_path("models", "yi-34b").is_relative_to(site / "sarathi_jax"), config_path("models", "yi-34b")
        print(*sorted(path.name for path in data_path("checkpoints").rglob("*")))"""
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(tmp_path / "site")}, "text": True}
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, **options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == sorted(path.name for path in (repo / "checkpoints").rglob("*"))
