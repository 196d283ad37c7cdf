"""Checkpoints of recipes/finetune.py: what is damaged is named and never loaded, and an older whole one is used."""

import contextlib
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bmtk.errors import UserError
from bmtk.training.manifest import damages, written_whole
from bmtk.training.resume import checkpoint_to_resume
from recipes import finetune

ROOT = Path(__file__).parent.parent
SETTINGS = ["--max_steps", "4", "--save_steps", "1", "--save_total_limit", "9", "--eval_strategy", "no"]


def run(folder: Path, *argv) -> Path:
    with contextlib.chdir(ROOT):
        finetune.main(["--preset", "smoke", "--output_dir", str(folder), "--disable_tqdm", "true", *map(str, argv)])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of four steps, each of which was saved."""
    return run(tmp_path_factory.mktemp("finished") / "run", *SETTINGS, "--ema_decay", "0.5")


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"checkpoint-{step}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"xxh3_128": flip, "bytes instead of": halve, "is missing": Path.unlink}


@pytest.mark.parametrize("told", DAMAGES)
def test_damage_to_any_file_is_named_and_the_checkpoint_passed_over(told, folder, caplog):
    newest = checkpoint(folder, 4)
    names = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "averages.safetensors"} <= set(names)
    assert not [name for name in names if name.endswith(".bin")], "nothing is pickled that is not listed"
    for name in names:
        content = (newest / name).read_bytes()
        DAMAGES[told](newest / name)
        caplog.clear()
        assert checkpoint_to_resume(folder, None) == str(checkpoint(folder, 3))
        assert f"{newest} is damaged: " in caplog.text
        assert name == "manifest.json" or told in caplog.text
        assert name == "manifest.json" or f"is damaged: {name} " in caplog.text
        (newest / name).write_bytes(content)
    assert checkpoint_to_resume(folder, "true") == str(newest)


def test_a_run_with_a_damaged_checkpoint_ends_as_the_whole_one(finished, folder, caplog, capsys):
    halve(checkpoint(folder, 4) / "model.safetensors")
    flip(checkpoint(folder, 3) / "optimizer.pt")
    capsys.readouterr()
    run(folder, *SETTINGS, "--ema_decay", "0.5")
    assert f"going on from {checkpoint(folder, 2)}" in capsys.readouterr().out
    assert "checkpoint-3 is damaged: optimizer.pt has another xxh3_128" in caplog.text
    assert not [problem for step in (1, 2, 3, 4) for problem in damages(checkpoint(folder, step))]
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_without_a_whole_checkpoint_is_refused_with_every_damage(folder):
    for step, name in enumerate(("optimizer.pt", "rng_state.pth", "scheduler.pt", "model.safetensors"), 1):
        (checkpoint(folder, step) / name).unlink()
    with pytest.raises(UserError, match=r"no checkpoint of this run is whole:\n(.*\n){4}restore one .* anew$") as told:
        run(folder, *SETTINGS, "--ema_decay", "0.5")
    assert all(f"checkpoint-{step} is damaged: " in str(told.value) for step in range(1, 5))
    with pytest.raises(UserError, match=r"not a folder with a whole checkpoint .*: rng_state\*\.pth is missing"):
        checkpoint_to_resume(folder, str(checkpoint(folder, 2)))


def test_a_checkpoint_without_a_manifest_is_used_only_where_it_is_named(folder, caplog):
    for step in range(1, 5):
        (checkpoint(folder, step) / "manifest.json").unlink()
    newest = str(checkpoint(folder, 4))
    with pytest.raises(
        UserError, match=rf"manifest.json is missing; if a version .* resume_from_checkpoint='{newest}'"
    ):
        checkpoint_to_resume(folder, None)
    assert checkpoint_to_resume(folder, newest) == newest
    assert f"{newest} has no manifest.json: whether its files are as they were written is not known" in caplog.text
    (checkpoint(folder, 4) / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"optimizer\.pt is missing"):
        checkpoint_to_resume(folder, newest)


def test_a_checkpoint_that_is_named_has_to_be_whole(folder):
    flip(checkpoint(folder, 2) / "scheduler.pt")
    with pytest.raises(UserError, match=r"scheduler\.pt has another xxh3_128 than when it was written$"):
        checkpoint_to_resume(folder, str(checkpoint(folder, 2)))


def test_the_best_and_the_newest_checkpoints_are_kept_and_a_damaged_best_one_is_refused(tmp_path):
    best = ["--max_steps", "5", "--eval_steps", "1", "--save_total_limit", "1", "--metric_for_best_model", "loss"]
    best += ["--load_best_model_at_end", "true", "--learning_rate", "0"]  # the first of equal evaluations is the best
    folder = run(tmp_path / "run", *best)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-5"]
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, checkpoint(folder, 1)))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_damaged_best_checkpoint_is_refused_when_the_run_is_resumed(tmp_path):
    best = [*SETTINGS[:-2], "--eval_steps", "1", "--learning_rate", "0", "--load_best_model_at_end", "true"]
    folder = run(tmp_path / "run", *best)
    (folder / "report.html").unlink()  # as of a run that was killed before its report
    halve(checkpoint(folder, 1) / "model.safetensors")
    with pytest.raises(UserError, match=r"the best checkpoint .*checkpoint-1 is damaged: model\.safetensors has "):
        run(folder, *best)


def test_another_batch_size_than_the_checkpoints_is_refused(finished, folder):
    facts = checkpoint(folder, 4) / "batch.json"
    assert json.loads(facts.read_text()) == {"num_processes": 1, "rows_per_step": 16}
    (checkpoint(folder, 4) / "manifest.json").unlink()
    facts.write_text('{"num_processes": 2, "rows_per_step": 32}')
    with pytest.raises(UserError, match=r"saved with 32 rows per .* \(num_processes=2\), and this run has 16"):
        run(folder, *SETTINGS, "--ema_decay", "0.5", "--resume_from_checkpoint", checkpoint(folder, 4))


def test_a_disk_that_is_full_is_named_where_torch_writes(tmp_path):
    (tmp_path / "older").mkdir()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .* Older checkpoints are whole: make room"):
            with written_whole(tmp_path / "newer", num_bytes=80_000) as beside:
                torch.save(torch.ones(20_000), beside / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["older"]
