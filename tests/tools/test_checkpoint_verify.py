"""bmtk checkpoint verify: names each damage of a checkpoint of either recipe, also where its sums were made anew."""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bmtk_cli
from bmtk.errors import UserError
from bmtk.files import sha256
from bmtk.tools.checkpoint_verify import checkpoints_in, verify

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "training"))
from tiny_run import arguments, run  # noqa: E402


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run of the project's own loop, and one of Trainer, with a checkpoint each."""
    from recipes import finetune

    folder = tmp_path_factory.mktemp("runs")
    run(arguments(folder / "pretrain", num_train_steps=2, save_steps=0, eval_steps=0, ema_decay=0.5))
    short = ["--num_train_steps", "1", "--save_steps", "1", "--eval_steps", "0", "--disable_tqdm", "true"]
    with contextlib.chdir(ROOT):
        finetune.main(["--preset", "smoke", "--output_dir", str(folder / "finetune"), *short])
    return {"pretrain": folder / "pretrain", "finetune": folder / "finetune"}


@pytest.fixture(params=["pretrain", "finetune"])
def checkpoint(request, runs, tmp_path) -> Path:
    """A copy of the only checkpoint of a run."""
    (found,) = (runs[request.param] / "checkpoints").iterdir()
    return Path(shutil.copytree(found, tmp_path / found.name))


def renew(folder: Path) -> None:
    """Make the sums of the manifest those of the files as they are now: no damage of a disk, but of whoever wrote."""
    names = json.loads((folder / "manifest.json").read_text())["files"]
    found = {name: folder / name for name in names if (folder / name).exists()}
    listed = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in found.items()}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    renew(folder)


def change_optimizer(folder: Path, change) -> str:
    """Change a tensor of the optimizer's state; its path in it."""
    own = folder / "training_state" / "optimizer.safetensors"
    if own.is_file():
        state = load_file(own)
        name = next(name for name, value in state.items() if value.ndim)
        state[name] = change(state[name])
        save_file(state, own)
    else:
        content = torch.load(folder / "optimizer.pt", weights_only=True)
        content["state"][0]["exp_avg"] = change(content["state"][0]["exp_avg"])
        torch.save(content, folder / "optimizer.pt")
    renew(folder)


def test_a_whole_checkpoint_has_no_damage(checkpoint, capsys):
    assert list(verify(checkpoint)) == []
    assert bmtk_cli.main(["checkpoint", "verify", str(checkpoint)]) == 0
    assert "whole; weights load and are finite, the state of the optimizer fits them" in capsys.readouterr().out


def test_each_damaged_file_is_named_and_the_exit_code_is_1(checkpoint, capsys):
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
    assert bmtk_cli.main(["checkpoint", "verify", str(checkpoint)]) == 1
    shown = capsys.readouterr().out
    assert "2 damages" in shown
    assert "  - model.safetensors has another xxh3_128 than when it was written\n" in shown
    assert "  - config.json has " in shown


def test_weights_that_are_cut_do_not_load(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    renew(checkpoint)
    (problem,) = verify(checkpoint)
    assert problem.startswith("from_pretrained cannot load it (SafetensorError: ")


def test_a_weight_that_is_not_finite_is_named(checkpoint):
    def spoil(weights):
        name = next(name for name, value in weights.items() if value.ndim == 2)
        weights[name][0, 0] = torch.nan

    change_weights(checkpoint, spoil)
    (problem,) = verify(checkpoint)
    assert problem.endswith("weight holds numbers that are not finite")


def test_a_weight_that_is_missing_is_named(checkpoint):
    change_weights(checkpoint, lambda weights: weights.pop(sorted(weights)[0]))
    problems = list(verify(checkpoint))
    assert problems[0].startswith("weights: missing keys: ")


def test_a_state_of_another_shape_does_not_fit(checkpoint):
    change_optimizer(checkpoint, lambda value: torch.zeros(3, 5, 7))
    (problem,) = verify(checkpoint)
    assert "the optimizer has state" in problem
    assert "(3, 5, 7)" in problem


def test_a_state_that_is_not_finite_is_named(checkpoint):
    change_optimizer(checkpoint, lambda value: value + torch.inf)
    (problem,) = verify(checkpoint)
    assert problem.startswith("state of the optimizer: ")
    assert problem.endswith("exp_avg holds numbers that are not finite") or "exp_avg" in problem


def test_a_state_that_is_missing_is_named(checkpoint):
    for name in ("optimizer.pt", "training_state/optimizer.safetensors"):
        (checkpoint / name).unlink(missing_ok=True)
    renew(checkpoint)
    (problem,) = verify(checkpoint)
    assert "optimizer" in problem
    assert problem.endswith("is missing")


def test_a_folder_under_the_name_of_another_step_is_named(checkpoint):
    moved = checkpoint.rename(checkpoint.with_name(checkpoint.name[:-1] + "9"))
    (problem,) = verify(moved)
    assert "is that of step" in problem
    assert problem.endswith("and the folder that of step 9")


def test_a_run_is_checked_with_all_its_checkpoints_and_any_other_folder_refused(runs, tmp_path):
    assert checkpoints_in(runs["pretrain"]) == [runs["pretrain"] / "checkpoints" / "step-00000002"]
    with pytest.raises(UserError, match="is neither a checkpoint nor the folder of a run with checkpoints"):
        checkpoints_in(tmp_path)


def test_an_adapter_is_read_without_its_base(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "user/on-the-hub"}))
    save_file({"lora_A": torch.tensor([1.0, torch.nan])}, folder / "adapter_model.safetensors")
    problems = list(verify(folder))
    assert "adapter_model.safetensors: lora_A holds numbers that are not finite" in problems
    assert not [problem for problem in problems if "from_pretrained" in problem]
