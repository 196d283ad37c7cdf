"""Every recipe and every config: it parses, its smoke preset runs, survives being killed, and leaves what loads."""

import hashlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from smoke_runs import RECIPE_CONFIGS, TINY
from transformers import AutoModel, AutoTokenizer, pipeline

from bmtk.arguments import changed_settings, chosen_fields, read_yaml, resolved_config
from bmtk.tasks import task_named
from bmtk.training.evaluation import predict_all
from bmtk.training.starting_weights import starting_config, starting_weights

ROOT = Path(__file__).parent.parent
SMOKE = [path for path in RECIPE_CONFIGS if path.stem == "smoke"]
RECIPE = re.compile(r"recipes/(pretrain|finetune)\.py")


def recipe_of(config: Path):
    """The recipe that the command in the config's header runs."""
    header = config.read_text(encoding="utf-8").splitlines()[0]
    return importlib.import_module(f"recipes.{RECIPE.search(header)[1]}")


def launch(*argv, env=None, **kwargs):
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE, **kwargs)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_there_are_configs_and_a_smoke_preset_for_every_task_that_has_configs():
    assert len(RECIPE_CONFIGS) >= 4
    assert {path.parent for path in SMOKE} == {path.parent for path in RECIPE_CONFIGS}


@pytest.mark.parametrize("config", RECIPE_CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_binds_and_the_command_in_its_header_runs_it(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *facts = config.read_text(encoding="utf-8").splitlines()[0].split("  |  ")
    assert command.startswith("# accelerate launch ")
    words = command.split()
    argv = words[next(i for i, word in enumerate(words) if RECIPE.search(word)) + 1 :]
    by_header, by_file = map(recipe_of(config).read_arguments, (argv, ["--config", str(config)]))
    assert by_header[2].output_dir == by_file[2].output_dir == read_yaml(config)["output_dir"]
    assert by_header[0].task == config.parent.name
    assert len(facts) >= 1, "the header says the hardware and the minutes"


@pytest.mark.parametrize("config", RECIPE_CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_changed_settings_are_a_config_that_says_the_same(config, tmp_path):
    recipe = recipe_of(config)
    parts = recipe.read_arguments(["--config", str(config)])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump({**changed_settings(*parts), "seed": 7}), encoding="utf-8")
    one, other = (resolved_config(*read) for read in (parts, recipe.read_arguments(["--config", str(again)])))
    assert {**one, "seed": 7, "config": str(again)} == other


def test_the_finished_folder_is_a_repository_with_report_and_card(pretrained):
    names = {path.name for path in pretrained.iterdir()}
    assert names >= {
        *("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("modeling_bm_transformer.py", "configuration_bm_transformer.py", "stems_bm.py", "heads_bm.py"),
        *("README.md", "report.html", "run.json", "history.jsonl", "recipe.yaml"),
    }
    facts = json.loads((pretrained / "run.json").read_text())
    assert facts["metrics"]["validation/tokens"] > 1000
    assert facts["samples"][0]["prompt"] == "ROMEO:"
    resolved = read_yaml(pretrained / "recipe.yaml")
    assert resolved["num_train_steps"] == 12
    assert resolved["hidden_size"] == 32


def test_the_finished_folder_loads_and_writes(pretrained):
    assert type(AutoModel.from_pretrained(pretrained)).__name__ == "BmTransformerModel"
    text = pipeline("text-generation", model=str(pretrained))("ROMEO:", max_new_tokens=5)[0]["generated_text"]
    assert text.startswith("ROMEO:")
    assert AutoTokenizer.from_pretrained(pretrained).decode([0]) == "<|endoftext|>"


def test_the_same_command_again_finds_the_run_complete(pretrained):
    from recipes import pretrain

    before = sha256(pretrained / "model.safetensors")
    pretrain.main(["--preset", "smoke", "--output_dir", str(pretrained), *TINY])
    assert sha256(pretrained / "model.safetensors") == before
    steps = [json.loads(line)["step"] for line in (pretrained / "history.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12, 12]


def test_another_run_in_the_same_folder_is_refused(pretrained):
    from recipes import pretrain

    argv = ["--preset", "smoke", "--output_dir", str(pretrained), *TINY, "--learning_rate", "1e-4"]
    with pytest.raises(ValueError, match=r"it differs in\n  learning_rate: 0\.003 there, 0\.0001 now"):
        pretrain.main(argv)


NO_GOAL = re.compile(r"tokens|(seasonal_)?naive_\w+|mean_colour_mae")  # a count, and what needs no model


@pytest.mark.parametrize("config", SMOKE, ids=lambda path: path.parent.name)
def test_a_task_names_the_metrics_that_it_measures(config, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run, data_args, *_, architecture = recipe_of(config).read_arguments(["--config", str(config)])
    data = task_named(run.task).read(data_args, folder=tmp_path, **run.reading)
    config = starting_config(run, data, chosen_fields(architecture))
    objective = data.bind(config)
    model, scorer, rows = starting_weights(objective, config, run), objective.scorer, objective.rows["validation"]
    predictions = predict_all(model, objective.batches_in_order(rows, batch_size=64), Accelerator(), scorer.preview)
    measured = {name for name in scorer.score(predictions, rows) if not NO_GOAL.fullmatch(name)}
    assert set(scorer.metrics) == measured
    assert scorer.main_metric in measured


def test_a_killed_run_goes_on_to_the_very_same_weights(pretrained, tmp_path):
    folder = tmp_path / "run"
    argv = ["--preset", "smoke", "--output_dir", folder, *TINY]
    process = launch("--cpu", "--num_processes", "1", "recipes/pretrain.py", *argv, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "model.safetensors").exists(), "the run ended before it could be killed"
    from recipes import pretrain

    pretrain.main(list(map(str, argv)))
    assert sha256(folder / "model.safetensors") == sha256(pretrained / "model.safetensors")


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(pretrained, tmp_path):
    argv = ["--preset", "smoke", "--output_dir", tmp_path / "run", *TINY]
    env = {"ACCELERATE_USE_CPU": "true"}
    ranks = ["--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()]
    process = launch(*ranks, "recipes/pretrain.py", *argv, env=env)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["environment"]["num_processes"] == 2
    one, two = (AutoModel.from_pretrained(folder).state_dict() for folder in (pretrained, tmp_path / "run"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    assert all(torch.isfinite(value).all() for value in two.values())


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, capsys):
    from recipes import pretrain

    pretrain.main(["--preset", "smoke", "--output_dir", str(tmp_path / "run"), "--dry_run"])
    printed = capsys.readouterr().out
    assert re.search(r"parameters +41,632 ", printed)
    assert re.search(r"tokens per step +512\n", printed)
    assert re.search(r"estimated time +[\d.]+ s ", printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_file", "no.txt", "--validation_file", "no.txt"], r"source='no.txt' does not exist"),
        (["--train_file", "mine.txt"], r"source='mine.txt' does not exist"),
        (["--validation_fraction", "1"], r"validation_fraction=1.0 is not a share; choose between 0 and 1"),
        (["--hidden_size", "0"], r"hidden_size=0 must be at least 1"),
        (["--model", "tests"], r"model='tests' is a folder without config.json"),
        (["-seed", "1"], r"'-seed' is no option; options begin with two dashes: '--seed'"),
        (["--no_qk_norm"], r"unknown key 'no_qk_norm'; did you mean 'qk_norm'"),
        (["--config", "x.yaml"], r"--config and --preset both name a config file"),
        (["--vocab_size", "100"], r"vocab_size=100 is too small for kind='byte_bpe'; it needs at least 257"),
        (["--learing_rate", "1"], r"unknown key 'learing_rate'; did you mean 'learning_rate'\?"),
        (["--task", "chess"], r"chess/smoke\.yaml does not exist; .* holds .*causal_lm"),
        (["--context_length", "64", "--max_position_embeddings", "32"], r"context_length=64 exceeds max_position_emb"),
        (["--batch_size", "0"], r"batch_size=0 is out of range"),
    ],
)
def test_bad_input_is_one_clear_error_and_no_model(argv, message, tmp_path):
    from recipes import pretrain

    with pytest.raises((ValueError, OSError), match=message):
        pretrain.main(["--preset", "smoke", "--output_dir", str(tmp_path / "run"), *argv])
    assert not (tmp_path / "run" / "config.json").exists()


def test_settings_mended_before_the_first_checkpoint_run_at_once(tmp_path):
    from recipes import pretrain

    argv = ["--preset", "smoke", "--output_dir", str(tmp_path / "run"), "--num_train_steps", "1"]
    with pytest.raises(OSError, match="does not exist"):
        pretrain.main([*argv, "--train_file", "no.txt", "--validation_file", "no.txt"])
    pretrain.main(argv)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_going_on_with_a_model_keeps_its_tokenizer_and_its_shape(pretrained, tmp_path, capsys):
    from recipes import pretrain

    argv = ["--preset", "smoke", "--model", str(pretrained), "--output_dir", str(tmp_path), "--num_train_steps", "1"]
    text = tmp_path / "text.txt"
    text.write_text("Another text, of another kind.\n" * 200)
    pretrain.main([*argv, "--train_file", str(text), "--validation_file", str(text), "--hidden_size", "48"])
    assert (tmp_path / "tokenizer.json").read_bytes() == (pretrained / "tokenizer.json").read_bytes()
    assert "keeps its own architecture: hidden_size" in capsys.readouterr().out
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["data"]["name"] == "text.txt"
    assert facts["data"]["licence"] is None
