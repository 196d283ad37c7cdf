"""Every command and every example in the documentation runs or parses."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import bmtk_cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)( no-run)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, *found) for page in PAGES for found in BLOCK.findall(page.read_text(encoding="utf-8"))]
COMMANDS = [
    (page.name, line) for page, language, _, text in BLOCKS if language == "bash" for line in text.splitlines() if line
]
EXAMPLES = [(page.name, run, text) for page, language, run, text in BLOCKS if language == "python"]


def check_accelerate(words):
    launched = launch_command_parser().parse_args(words)
    assert not launched.config_file or (ROOT / launched.config_file).is_file()
    script = ROOT / launched.training_script
    assert script.is_file()
    importlib.import_module(f"recipes.{script.stem}").read_arguments(launched.training_script_args)


def check_bmtk(words):
    if words[0] in (*bmtk_cli.RECIPES, "prepare"):  # has the options of a recipe
        recipe = {"prepare": "pretrain"}.get(words[0], words[0])
        importlib.import_module(f"recipes.{recipe}").read_arguments(words[1:])
    else:
        bmtk_cli.build_parser().parse_args(words)


def check_python(words):
    if words[0] == "-m":
        assert words[1] == "pytest"
    else:
        assert words[0] == "-c"
        compile(words[1], "README", "exec")


def check_make(words):
    targets = re.findall(r"^([\w.]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert words[0] in targets


def check_pip(words):
    assert words[:4] == ["install", "-c", "constraints.txt", "."]
    assert (ROOT / "constraints.txt").is_file()


def check_torchrun(words):
    launched = get_args_parser().parse_args(words)
    importlib.import_module(f"recipes.{Path(launched.training_script).stem}").read_arguments(
        launched.training_script_args
    )


CHECKS = {
    "accelerate": lambda words: check_accelerate(words[1:]),
    "bmtk": check_bmtk,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
}


def test_there_are_commands_and_examples():
    assert len(COMMANDS) >= 10
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda text: text[:80])
def test_a_command_of_the_documentation_parses(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    CHECKS[words[0].rsplit("/", 1)[-1]](words[1:])


@pytest.mark.parametrize(("page", "no_run", "text"), EXAMPLES)
def test_an_example_of_the_documentation_runs(page, no_run, text, pretrained, tmp_path, monkeypatch):
    code = compile(text, page, "exec")
    if no_run:
        return
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "pretrain").symlink_to(pretrained)
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_the_tree_in_the_readme_names_only_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^    ([\w/]+/)", text[text.index("## Project layout") :], re.MULTILINE)
    assert len(named) >= 7
    assert [name for name in named if not (ROOT / name).is_dir()] == []
