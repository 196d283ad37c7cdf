"""bmtk verify parallel: the same settings for every leg, dropout off, and a verdict with the first difference."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bmtk.tools import verify_parallel as tool
from bmtk.tools.recipe_runs import Recipe, Watch
from bmtk.tools.verify_parallel import common_settings, verify_parallel

SETTINGS = {"output_dir": "outputs/run", "batch_size": 6, "search": None}


def recipe(tmp_path, *, name="pretrain", **settings):
    architecture = frozenset(("hidden_dropout", "drop_path_rate", "hidden_size"))
    return Recipe(tmp_path / f"{name}.py", ["--config", "my.yaml"], SETTINGS | settings, architecture)


@pytest.fixture
def legs(monkeypatch, tmp_path):
    """Runs in place of processes: a folder each, with the losses that the test gives to the leg of that name."""
    monkeypatch.chdir(tmp_path)
    losses, commands = {"one": [2.0, 1.0], "two": [2.0, 1.0], "sharded": [2.0, 1.0]}, []

    def run(command, folder, *, steps, log, on_cpu):
        commands.append(command)
        folder.mkdir(parents=True)
        lines = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses[folder.name], 1)]
        (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        watch = Watch(folder, steps)
        watch.code, watch.seconds = 0, 1.0
        return watch

    monkeypatch.setattr(tool, "run_child", run)
    return losses, commands


def verify(a_recipe):
    lines = []
    return verify_parallel(a_recipe, steps=2, work_dir=None, log=lines.append), "\n".join(lines)


def words(command):
    """The options of a command line by their names; the last of several counts."""
    pairs = zip(command, [*command[1:], ""], strict=True)
    return {name.removeprefix("--"): value for name, value in pairs if name.startswith("--")}


def test_equal_runs_are_the_same_and_leave_nothing(legs, tmp_path):
    code, said = verify(recipe(tmp_path))
    assert code == 0
    assert "THE SAME on any of these numbers of processes" in said
    assert "sharded over two processes: skipped, as recipes/pretrain.py has no fsdp_size" in said
    assert list((tmp_path / "outputs").iterdir()) == []


def test_both_legs_have_the_same_rows_and_no_dropout(legs, tmp_path):
    _, commands = legs
    verify(recipe(tmp_path))
    one, two = map(words, commands)
    assert "--num_processes" not in commands[0]
    assert two["num_processes"] == "2"
    for options in (one, two):
        assert (options["batch_size"], options["micro_batch_size"], options["precision"]) == ("6", "3", "fp32")
        assert (options["hidden_dropout"], options["drop_path_rate"]) == ("0", "0")
        assert options["push_to_hub"] == "null"
        assert "hidden_size" not in options


def test_a_sharded_leg_runs_where_the_recipe_knows_the_option(legs, tmp_path):
    losses, commands = legs
    losses["sharded"] = [2.0, 1.01]
    code, said = verify(recipe(tmp_path, fsdp_size=1))
    assert words(commands[2])["fsdp_size"] == "2"
    assert code == 1
    assert "DIFFERENT on 2, sharded processes: the first difference is at step 2: loss is 1.0 and 1.01" in said
    (kept,) = (tmp_path / "outputs").iterdir()
    assert f"the runs are kept in {kept.relative_to(tmp_path)}" in said


def test_odd_batches_are_made_even_and_trainers_sizes_are_those_of_a_step(tmp_path):
    changes, notes = common_settings(recipe(tmp_path, batch_size=7), on_cpu=True)
    assert (changes["batch_size"], changes["micro_batch_size"]) == (8, 4)
    assert "8 rows per step, in micro-batches of half of them" in notes
    sizes = {"batch_size": None, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    changes, _ = common_settings(recipe(tmp_path, name="finetune", lora_dropout=0.1, **sizes), on_cpu=True)
    assert (changes["batch_size"], changes["use_cpu"], changes["lora_dropout"]) == (12, True, 0)


def test_a_leg_that_fails_is_shown(legs, tmp_path, monkeypatch):
    def fails(command, folder, **options):
        watch = Watch(folder, 2)
        Path(f"{folder}.log").write_text("error: no\n")
        watch.code = 3
        return watch

    monkeypatch.setattr(tool, "run_child", fails)
    code, said = verify(recipe(tmp_path))
    assert code == 1
    assert "FAILED with exit code 3:\n    error: no" in said
