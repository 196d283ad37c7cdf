"""The commands of "Runs, checkpoints, proofs" in docs/training.md do what they promise, on a real run."""

import re
import shlex
from pathlib import Path

import pytest

import bmtk_cli

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("## Runs, checkpoints, proofs\n")[1]
COMMANDS = re.search(r"```bash\n(.*?)```", SECTION, re.DOTALL)[1].splitlines()
SHORTER = {"resume": ["--kills", "1", "--steps", "4"], "parallel": ["--steps", "2"]}
SAYS = {
    "runs": "finished",
    "checkpoint": "whole; weights load and are finite",
    "resume": "EQUAL after 1 kill: its 4 steps, checkpoints and final weights are those of",
    "parallel": "THE SAME on any of these numbers of processes",
}


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_about_runs_and_checkpoints_says_what_is_promised(line, pretrained, tmp_path, monkeypatch, capfd):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "pretrain").symlink_to(pretrained)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    kind = words[1] if words[0] == "verify" else words[0]
    code = bmtk_cli.main([*words, *SHORTER.get(kind, [])])
    shown = capfd.readouterr().out
    assert code == 0, shown
    assert SAYS[kind] in shown
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["pretrain"], "what is well is not kept"
