"""The `bmtk` command: it answers at once, teaches, and ends with an exit status that scripts can trust."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


def bmtk(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "bmtk_cli.py", *arguments], capture_output=True, text=True, **options
    )


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (tmp_path / "run.json").write_text('{"metrics": {"validation/loss": 1.87654}}')
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "model.safetensors")
    return tmp_path


def test_help_imports_neither_torch_nor_bmtk():
    program = (
        "import sys, bmtk_cli; bmtk_cli.build_parser().format_help(); print({'torch', 'bmtk'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
    )


def test_help_teaches_every_command_with_an_example():
    text = bmtk("--help").stdout
    for line in (
        "push ",
        "info ",
        "convert ",
        "models ",
        "bmtk models ",
        "bmtk convert microsoft/resnet-18 ",
        "example:",
        "bmtk push outputs/pretrain user/my-model --dry-run",
        "next:",
    ):
        assert line in text
    assert "Never sent: optimizer state" in bmtk("push", "--help").stdout


def test_python_m_bmtk_is_the_same_command():
    run = subprocess.run([sys.executable, "-m", "bmtk", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == bmtk("--version").stdout
    assert run.stdout.startswith("bmtk ")


def test_a_wrong_command_line_ends_with_2():
    assert bmtk("pusch").returncode == 2
    assert bmtk().returncode == 2


def test_info_tells_class_size_and_results(saved):
    lines = [line.split() for line in bmtk("info", saved).stdout.splitlines()]
    assert ["model", "LlamaForCausalLM"] in lines
    assert ["parameters", "17"] in lines
    assert ["stored", "as", "F32"] in lines
    assert ["validation/loss", "1.8765"] in lines


def test_info_of_another_folder_ends_with_1(tmp_path):
    run = bmtk("info", tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert "holds neither config.json nor adapter_config.json" in run.stderr


def test_push_of_another_folder_ends_with_1_and_its_problem(tmp_path):
    run = bmtk("push", tmp_path, "ann/m", "--dry-run")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"bmtk push: {tmp_path} cannot be published:\n" + (
        "  - no config.json (nor adapter_config.json): pass the folder that save_pretrained wrote\n"
        "  - no weights (model.safetensors)\n"
    )
