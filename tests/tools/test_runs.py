"""bmtk runs: how far each run below a folder is, and what is not well with it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import bmtk_cli
from bmtk.errors import UserError
from bmtk.tools.runs import as_table, runs_below
from bmtk.training.manifest import written_whole

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = {"task": "causal_lm", "model_type": "bm_rnn", "model": None, "num_train_steps": 6, "nonfinite": "stop"}
FINETUNE = {"task": "translation", "model": "outputs/base", "num_train_steps": None, "max_steps": -1}
HISTORY = [
    {"step": 2, "loss": 3.0},
    {"step": 2, "validation/loss": 2.5, "validation/bleu": 10.0},
    {"step": 4, "loss": 2.0},
    {"step": 4, "validation/loss": 2.75, "validation/bleu": 30.0},
]


def write_run(folder, config=PRETRAIN, *, history=HISTORY, steps=(2, 4), prefix="step-", state=None):
    folder.mkdir(parents=True)
    (folder / "run_config.json").write_text(json.dumps(config))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    for step in steps:
        with written_whole(folder / "checkpoints" / f"{prefix}{step}", num_bytes=0) as beside:
            (beside / "model.safetensors").write_bytes(bytes(1000))
            for name, content in (state or {}).items():
                (beside / name).parent.mkdir(exist_ok=True)
                (beside / name).write_text(json.dumps(content))
    return folder


def finish(folder, *, recipe="pretrain", metric="bleu"):
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "about": {"main_metric": metric}}))
    (folder / "model.safetensors").write_bytes(bytes(8))


def test_an_interrupted_run_shows_its_steps_losses_and_checkpoints(tmp_path):
    write_run(tmp_path / "a")
    (run,) = runs_below(tmp_path)
    assert (run.recipe, run.task, run.model, run.state) == ("pretrain", "causal_lm", "bm_rnn", "interrupted")
    assert (run.step, run.num_steps, run.loss, run.validation_loss) == (4, 6, 2.0, 2.75)
    assert (run.main_metric, run.best, run.best_step) == ("loss", 2.5, 2), "of a loss the lowest is the best"
    assert [checkpoint.step for checkpoint in run.checkpoints] == [2, 4]
    manifest = (tmp_path / "a" / "checkpoints" / "step-2" / "manifest.json").stat().st_size
    assert run.checkpoints[0].bytes == 1000 + manifest
    assert run.health == []


def test_a_finished_run_has_the_best_of_its_main_metric(tmp_path):
    finish(write_run(tmp_path / "a", FINETUNE, prefix="checkpoint-"), recipe="finetune")
    (run,) = runs_below(tmp_path)
    assert (run.recipe, run.model, run.state, run.num_steps) == ("finetune", "outputs/base", "finished", 4)
    assert (run.main_metric, run.best, run.best_step) == ("bleu", 30.0, 4)


def test_the_steps_of_epochs_are_those_that_trainer_has_counted(tmp_path):
    write_run(tmp_path / "a", FINETUNE, prefix="checkpoint-", state={"trainer_state.json": {"max_steps": 90}})
    write_run(tmp_path / "b", PRETRAIN | {"num_train_steps": -1})
    assert [run.num_steps for run in runs_below(tmp_path)] == [90, None]
    assert " 4/90 " in (table := as_table(runs_below(tmp_path), below=tmp_path))
    assert " 4/? " in table


def test_a_checkpoint_that_has_lost_a_file_or_a_part_of_one_is_damaged(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "checkpoints" / "step-2" / "model.safetensors").unlink()
    (folder / "checkpoints" / "step-4" / "model.safetensors").write_bytes(bytes(999))
    (run,) = runs_below(tmp_path)
    assert run.health == [
        "checkpoint of step 2 is damaged: model.safetensors is missing",
        "checkpoint of step 4 is damaged: model.safetensors has 999 bytes instead of 1000",
    ]
    assert "`bmtk checkpoint verify RUN`" in as_table([run], below=tmp_path)


def test_steps_that_were_not_finite_and_leftovers_are_named(tmp_path):
    progress = {"training_state/state.json": {"progress": {"skipped": [1, 3]}}}
    history = [*HISTORY, {"step": 5, "loss": None, "num_overflows": 7}]
    folder = write_run(tmp_path / "a", history=history, state=progress)
    (folder / "checkpoints" / ".partial-step-6").mkdir()
    (run,) = runs_below(tmp_path)
    assert run.health == [
        "2 steps skipped, as they were not finite (the last is 3)",
        "7 steps skipped by the scaler of fp16",
        "loss not finite at step 5",
        "1 unfinished left by a kill (.partial-step-6); the same command deletes them",
    ]
    assert run.loss == 2.0, "the last that is a number"


def test_a_run_whose_process_is_alive_is_running_and_its_partial_folder_is_no_leftover(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "checkpoints" / ".partial-step-6").mkdir()
    here = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    states = {
        f"process {os.getpid()} on {here}\n": f"running (process {os.getpid()})",
        f"process {dead.pid} on {here}\n": "interrupted",
        f"process 1 on not-{here}\n": f"interrupted or running on not-{here}",
        "": "interrupted",
    }
    for lock, state in states.items():
        (folder / ".lock").write_text(lock)
        (run,) = runs_below(tmp_path)
        assert run.state == state
        assert (run.health == []) == ("running" in state)


def test_runs_are_found_at_any_depth_and_none_inside_of_another_ones_checkpoints(tmp_path):
    for name in ("b/c", "a", "search/trials/0"):
        write_run(tmp_path / name)
    write_run(tmp_path / "a" / "checkpoints" / "step-9")
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    assert [Path(run.folder).relative_to(tmp_path).as_posix() for run in runs_below(tmp_path)] == [
        *("a", "b/c", "search/trials/0"),
    ]


def test_the_table_is_aligned_and_json_holds_the_same(tmp_path, capsys):
    finish(write_run(tmp_path / "a-long-name"))
    write_run(tmp_path / "b")
    assert bmtk_cli.main(["runs", str(tmp_path)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    start = header.index("state")
    assert [row[start : start + 12].strip() for row in rows[:2]] == ["finished", "interrupted"]
    assert {row[start - 2 : start] for row in rows[:2]} == {"  "}
    assert bmtk_cli.main(["runs", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in found] == ["finished", "interrupted"]
    assert found[1]["checkpoints"][0]["step"] == 2


def test_an_empty_folder_and_one_that_is_not_there(tmp_path):
    assert as_table(runs_below(tmp_path), below=tmp_path).startswith(f"no run below {tmp_path}; ")
    with pytest.raises(UserError, match="is not a folder; give one that holds output folders"):
        runs_below(tmp_path / "none")


@pytest.mark.slow
def test_the_list_needs_no_library_that_takes_seconds(tmp_path):
    write_run(tmp_path / "a")
    code = "import sys, bmtk_cli; bmtk_cli.main(sys.argv[1:]); print({'torch', 'transformers'} & set(sys.modules))"
    command = [sys.executable, "-c", code, "runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
