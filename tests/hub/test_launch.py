"""The command that repeats a run, as it was typed, and the one that installs the version that made it."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bmtk import process
from bmtk.hub import launch

ROOT = Path(__file__).parents[2]
SCRIPT = f"""
import sys, types
for name in ("bmtk", "bmtk.hub"):  # without what they import, which takes seconds
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(ROOT)!r} + "/" + name.replace(".", "/")]
from bmtk.hub.launch import launch_command
open(sys.argv[-1], "w").write(launch_command())
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("python train.py --a 'b c' {out}", "python train.py --a 'b c' {out}"),
        (
            "ACCELERATE_USE_CPU=true python -m accelerate.commands.launch --num_processes 2 --multi_gpu "
            "--mixed_precision no train.py {out}",
            "ACCELERATE_USE_CPU=true accelerate launch --num_processes 2 --multi_gpu --mixed_precision no "
            "train.py {out}",
        ),
    ],
)
def test_the_command_is_the_one_that_was_typed(script, typed, expected):
    """Runs in a shell that finds this python under that name."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    typed = typed.format(out="said.txt").replace("python", shlex.quote(sys.executable))
    subprocess.run(["sh", "-c", typed], cwd=script, env=environment, check=True, capture_output=True)
    assert (script / "said.txt").read_text() == expected.format(out="said.txt")


@pytest.mark.parametrize(
    ("parent", "found"),
    [
        (["/v/python", "/v/bin/accelerate", "launch", "--cpu", "a.py", "-x"], ["accelerate", "launch", "--cpu"]),
        (["/v/python", "-m", "torch.distributed.run", "--nnodes", "1", "a.py", "-x"], ["torchrun", "--nnodes", "1"]),
        (["/v/bin/torchrun", "--standalone", "a.py", "-x"], ["torchrun", "--standalone"]),
        (["/v/bin/accelerate", "launch", "b.py", "-x"], []),  # the parent of another script
        (["bash"], []),
        ([], []),
    ],
)
def test_a_launcher_is_known_by_what_it_started(parent, found):
    assert process.launcher_options(parent, ["a.py", "-x"]) == found


def test_without_a_view_of_the_launcher_the_number_of_processes_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "PROC", tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes/finetune.py", "--data_name", "a b"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch.launch_command() == "python recipes/finetune.py --data_name 'a b'"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch.launch_command().startswith("accelerate launch --num_processes 4 recipes/finetune.py ")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/bmtk", "finetune"])
    assert launch.launch_command() == "bmtk finetune"


@pytest.mark.parametrize(
    ("noted", "command"),
    [
        (
            {"url": "https://example.org/a/b", "vcs_info": {"vcs": "git", "commit_id": "abc1"}},
            'pip install "git+https://example.org/a/b@abc1"',
        ),
        (
            {"url": "https://example.org/b-1-py3-none-any.whl"},
            'pip install "https://example.org/b-1-py3-none-any.whl"',
        ),
        ({"url": "https://ann:pass-word@example.org/b.whl"}, 'pip install "https://[redacted]@example.org/b.whl"'),
        ({"url": "file:///somewhere/b", "dir_info": {"editable": True}}, None),
        ({}, None),
    ],
)
def test_an_installation_is_named_by_where_pip_got_it(monkeypatch, noted, command):
    found = SimpleNamespace(read_text=lambda name: json.dumps(noted))
    monkeypatch.setattr(launch, "distribution", lambda name: found)
    assert launch.install_command() == command
