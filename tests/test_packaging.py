"""The wheel: everything that runs is in it, and nothing else."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, text=True)
    return zipfile.ZipFile(next(folder.glob("big_model_toolkit-*.whl")))


def test_the_wheel_holds_every_module_and_template_and_no_test(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT)) for path in (ROOT / "bmtk").rglob("*") if path.suffix in {".py", ".html", ".md"}
    }
    shipped = [path for path in (ROOT / "recipes").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    recipes = {f"bmtk_{path.relative_to(ROOT)}" for path in shipped}
    assert packed == wanted | {"bmtk_cli.py"} | recipes


def test_the_installed_command_finds_recipes_and_data_without_a_clone(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    wheel.extractall(site)
    elsewhere.mkdir()
    env = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "bmtk_cli", "finetune", "--preset", "smoke", "--output_dir", "run"]
    done = subprocess.run([*command, "--max_steps", "2"], cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("loading PyTorch and transformers ...\n")
    assert "next: " in done.stdout
    assert (elsewhere / "run" / "model.safetensors").is_file()


def test_the_metadata_names_distribution_licence_and_pythons(wheel):
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    assert "\nName: big-model-toolkit\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    for minor in (10, 11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}\n" in metadata
    assert "\nProvides-Extra: quantize\n" in metadata  # what an error of bmtk.training.quantization tells to install
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_every_dependency_has_a_tested_version():
    named = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requires("big-model-toolkit")}
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    own = {"big-model-toolkit"}  # an extra that names another
    assert {name.replace("_", "-") for name in named} - own <= {name.replace("_", "-") for name in pinned}
