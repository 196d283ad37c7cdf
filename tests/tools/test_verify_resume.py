"""bmtk verify resume: kills where it says so, and finds what a wrong resumption changes."""

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from bmtk.errors import UserError
from bmtk.tools.recipe_runs import Kill, Recipe, Watch, last_step, recipe_of, run_child, scratch_folder
from bmtk.tools.verify_resume import planned_kills, verify_resume

STAND_IN = Path(__file__).with_name("stand_in_recipe.py")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Makes a recipe with a fault, or none, whose output_dir is below the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(STAND_IN, tmp_path / "pretrain.py")
    (tmp_path / "my.yaml").write_text("task: counting\n")
    return lambda fault="none": Recipe.read("my.yaml", "pretrain", recipes=tmp_path, options=["--fault", fault])


def verify(recipe, *, kills=4, steps=8, seed=0, work_dir=None):
    lines = []
    code = verify_resume(recipe, steps=steps, kills=kills, seed=seed, work_dir=work_dir, log=lines.append)
    return code, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_resumes_exactly_is_equal_after_all_kinds_of_kills(recipe, seed, tmp_path):
    code, said = verify(recipe(), seed=seed)
    assert code == 0, said
    assert "EQUAL after 4 kills: its 8 steps" in said
    for phase in ("training", "saving", "starting", "ending"):
        assert f"  {phase} " in said, "all four are in the table"
    assert list((tmp_path / "outputs").iterdir()) == [], "what is equal is not kept"


@pytest.mark.slow
def test_a_resumption_that_forgets_is_found_with_its_first_step(recipe, tmp_path):
    code, said = verify(recipe("forgets"), kills=1)
    assert code == 1
    assert "DIFFERENT: the first difference is at step " in said
    assert "history.jsonl: loss is " in said
    assert "two runs that were left alone are equal to the bit, so it is the resuming" in said
    (kept,) = (tmp_path / "outputs").iterdir()
    assert f"the runs are kept in {kept.relative_to(tmp_path)}" in said
    assert {"whole", "killed", "whole-again", "whole.log", "killed.log"} <= {path.name for path in kept.iterdir()}


@pytest.mark.slow
def test_a_machine_that_gives_other_numbers_each_time_is_not_blamed_on_the_resuming(recipe):
    code, said = verify(recipe("noise"), kills=1)
    assert code == 1
    assert "two runs that were left alone differ as well (step 1: history.jsonl: loss is " in said


@pytest.mark.slow
def test_a_recipe_that_fails_is_shown_with_its_own_words(recipe):
    code, said = verify(recipe("fails"))
    assert code == 1
    assert "the recipe ended with exit code 1:\n    error: the disk is on fire" in said
    assert "FAILED: see " in said


@pytest.mark.slow
def test_kills_that_come_too_late_give_no_verdict(recipe, monkeypatch):
    monkeypatch.setattr("bmtk.tools.verify_resume.planned_kills", lambda *args: [Kill("training", 999)])
    code, said = verify(recipe(), kills=1)
    assert code == 1
    assert "NO VERDICT: the run ended before a kill came; give more --steps" in said


@pytest.mark.slow
def test_a_work_folder_stays_and_has_to_be_empty(recipe, tmp_path):
    code, _ = verify(recipe(), kills=1, work_dir=str(tmp_path / "work"))
    assert code == 0
    assert (tmp_path / "work" / "killed" / "model.safetensors").is_file()
    with pytest.raises(UserError, match=r"work_dir='.*work' is not empty; give a new or empty folder"):
        verify(recipe(), work_dir=str(tmp_path / "work"))


def test_a_search_is_refused(recipe, tmp_path):
    searching = STAND_IN.read_text().replace("search: str | None = None", "search: str = 'optuna'")
    (tmp_path / "pretrain.py").write_text(searching)
    with pytest.raises(UserError, match="search=optuna makes many runs, and one is verified"):
        recipe()


# Moments -------------------------------------------------------------------------------------------------------------


def timing(*, steps=10, first_step=4.0, last_step=13.0, seconds=20.0, saves=(1.0, 3.0)):
    watch = Watch(Path("nowhere"), steps, first_step=first_step, last_step=last_step, saves=list(saves))
    watch.seconds = seconds
    return watch


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_moments_are_within_what_the_undisturbed_run_took(count):
    spans = {"starting": 4.0, "training": 1.0, "saving": 2.0, "ending": 3.5}
    delays = {phase: [] for phase in spans}
    for seed in range(60):
        kills = planned_kills(count, seed, timing())
        assert kills == planned_kills(count, seed, timing())
        assert [kill.step for kill in kills] == sorted(kill.step for kill in kills)
        assert {kill.step for kill in kills} <= set(range(1, 10))
        assert (kills[-1].phase == "ending") == (count > 3)
        for kill in kills:
            delays[kill.phase].append(kill.delay)
    for phase, found in delays.items():
        assert all(0 <= delay < spans[phase] for delay in found)
    assert max(delays["training"]) > 0.5, "seeds are different"
    if count > 1:
        assert delays["saving"], "one of two is while saving"


WRITER = """
import json, os, sys, time
folder = sys.argv[1]
time.sleep(0.1)
os.rmdir(f"{folder}/checkpoints/.partial-step-0")
open(f"{folder}/history.jsonl", "w").close()
for step in range(1, 40):
    time.sleep(0.02)
    with open(f"{folder}/history.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    if step in (5, 20):
        os.mkdir(f"{folder}/checkpoints/.partial-step-{step}")
        time.sleep(0.2)
        os.rmdir(f"{folder}/checkpoints/.partial-step-{step}")
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["training", "saving", "ending"])
def test_a_kill_comes_in_its_phase_and_not_because_of_what_an_earlier_process_has_left(phase, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / ".partial-step-0").mkdir(parents=True)
    (folder / "history.jsonl").write_text('{"step": 30}\n')
    command = [sys.executable, "-c", WRITER, str(folder)]
    watch = run_child(command, folder, steps=39, log=print, kill=Kill(phase, 9))
    assert watch.code == -signal.SIGKILL
    reached = last_step(folder)
    if phase == "training":
        assert 9 <= reached < 20
    elif phase == "saving":
        assert reached == 20
        assert (folder / "checkpoints" / ".partial-step-20").exists()
    else:
        assert reached == 39


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(60)
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_child_is_killed_with_what_it_has_started_when_the_command_is_interrupted(tmp_path, monkeypatch):
    noted = tmp_path / "pid"

    def interrupted(*args):
        while not (noted.exists() and noted.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("bmtk.tools.recipe_runs._follow", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", PARENT, str(noted)], tmp_path / "run", steps=1, log=print)
    assert time.monotonic() - started < 30
    time.sleep(0.2)
    assert not is_alive(int(noted.read_text()))


def test_the_last_whole_line_is_the_step(tmp_path):
    assert last_step(tmp_path) == 0
    (tmp_path / "history.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"ste')
    assert last_step(tmp_path) == 4


def test_the_recipe_of_a_config_is_the_one_that_it_names(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("# accelerate launch recipes/finetune.py --preset smoke  |  seconds\ntask: x\n")
    assert recipe_of(config) == "finetune"
    config.write_text("# bmtk pretrain --config my.yaml\ntask: x\n")
    assert recipe_of(config) == "pretrain"
    config.write_text("task: x\n")
    with pytest.raises(UserError, match=r"my\.yaml does not say .* give --recipe pretrain or --recipe finetune"):
        recipe_of(config)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": "finetune"}))
    assert recipe_of(config) == "finetune"


def test_nothing_is_left_where_a_verification_breaks_off(tmp_path):
    def breaks_off():
        with scratch_folder(tmp_path / "outputs" / "run", None, purpose="verify") as scratch:
            (scratch.folder / "big").write_text("x")
            assert scratch.folder.name.startswith("run-verify-")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        breaks_off()
    assert list((tmp_path / "outputs").iterdir()) == []


def test_a_seeded_generator_draws_the_steps():
    draw = random.Random(3)
    expected = sorted(draw.randint(1, 9) for _ in range(4))
    assert [kill.step for kill in planned_kills(4, 3, timing())] == expected
