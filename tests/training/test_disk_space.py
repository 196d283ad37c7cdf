"""A disk that is too small is named before a run trains; one that becomes full leaves what was saved whole."""

import contextlib
import errno
import json
import logging
import math
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_run import arguments, digest, run, tiny_model
from transformers import AutoModelForCausalLM

from bmtk.errors import UserError, user_message
from bmtk.training import disk_space, manifest
from bmtk.training.arguments import LoopArguments
from bmtk.training.checkpoint import TrainState, load_checkpoint, newest_checkpoint, save_checkpoint
from bmtk.training.disk_space import check_room, checkpoint_bytes, expected_bytes, saves_to_come
from bmtk.training.finetuning_arguments import FineTuningArguments
from bmtk.training.history import History
from bmtk.training.manifest import MANIFEST, damages, written_whole
from bmtk.training.prepared import prepare
from bmtk.training.resume import delete_older, step_of

ROOT = Path(__file__).resolve().parents[2]


# Before the first step -----------------------------------------------------------------------------------------------


def on_disk(folder: Path) -> int:
    """Bytes of the tensors of a checkpoint, without headers."""
    files = [path for path in folder.rglob("*.safetensors") if path.name != "randomness.safetensors"]
    return sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files)


@pytest.mark.parametrize(
    "settings", [{}, {"ema_decay": 0.5}, {"optimizer": "sgd"}, {"optimizer": "sgd", "sgd_momentum": 0.0}], ids=str
)
def test_what_a_checkpoint_takes_is_known_before_the_first_step(settings, tmp_path):
    args = arguments(tmp_path, num_train_steps=1, save_steps=0, eval_steps=0, **settings)
    expected = expected_bytes(tiny_model(), args)
    run(args)
    written = on_disk(tmp_path / "checkpoints" / "step-00000001")
    assert expected == pytest.approx(written, rel=0.01)  # counters, and a table of positions that is not saved
    prepared = prepare(tiny_model(), args, Accelerator(cpu=True))
    load_checkpoint(tmp_path / "checkpoints" / "step-00000001", prepared)
    average = bool(args.ema_decay)
    found = checkpoint_bytes(prepared.unwrapped, prepared.optimizer.state, has_average=average)
    assert found == pytest.approx(written, rel=0.01)


def test_trainers_optimizers_are_counted_where_their_states_are_known(tmp_path):
    weights = expected_bytes(tiny_model(), LoopArguments(optimizer="sgd", sgd_momentum=0.0))
    for optim, copies in {"adamw_torch": 2, "adamw_torch_fused": 2, "adafactor": 0, "sgd": 0}.items():
        args = FineTuningArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
        expected = weights * (1 + copies)
        assert expected_bytes(tiny_model(), args) == pytest.approx(expected, rel=0.01) or optim == "sgd"


def test_the_saves_to_come_are_those_of_a_loop():
    for total in range(1, 9):
        for every in range(0, 10):
            for step in range(total + 1):
                later = range(step + 1, total + 1)
                saves = sum(1 for one in later if one == total or (every and one % every == 0))
                assert saves_to_come(every, step=step, total=total) == saves


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_train_epochs": 4}, 4),
        ({"save_steps": 30}, 4),
        ({"save_steps": 0.5}, 2),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, 1),
    ],
)
def test_the_saves_of_trainer_follow_its_strategy(settings, expected, tmp_path):
    args = FineTuningArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert args.saves_to_come(0, 100) == expected


@pytest.mark.parametrize(
    ("room", "keep", "saves", "there", "word"),
    [
        (0.99, 2, 5, 0, "none could be saved"),  # checkpoints of its size, of how many there is room for
        (1.01, 2, 5, 0, "3 checkpoints of about"),
        (2.99, 2, 5, 0, "3 checkpoints of about"),
        (3.01, 2, 5, 0, ""),
        (1.01, 2, 5, 2, ""),  # two of the three are there already
        (1.01, 2, 1, 0, ""),  # the run makes one only
        (4.99, 0, 5, 0, "5 checkpoints of about"),  # all are kept
        (5.01, 0, 5, 0, ""),
        (0.01, 2, 0, 0, ""),  # nothing is saved any more
    ],
)
def test_a_disk_is_refused_or_warned_of_by_what_fits(room, keep, saves, there, word, tmp_path, caplog, monkeypatch):
    args, model = LoopArguments(output_dir=str(tmp_path), save_total_limit=keep), tiny_model()
    for step in range(there):
        (tmp_path / "checkpoints" / f"step-0000000{step}").mkdir(parents=True)
    size = 3 * sum({p.data_ptr(): p.numel() * 4 for p in model.parameters()}.values())
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: size * room + 100)  # of buffers
    if room < 1 and saves:
        with pytest.raises(UserError, match=word):
            check_room(args, model, saves=saves)
        return
    with caplog.at_level(logging.WARNING):
        check_room(args, model, saves=saves)
    assert (word in caplog.text) if word else not caplog.text


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_both_recipes_refuse_a_disk_without_room_before_a_step(name, tmp_path, monkeypatch):
    from recipes import finetune, pretrain

    recipe, monkeypatched = {"pretrain": pretrain, "finetune": finetune}[name], (lambda path: 9000.0)
    monkeypatch.setattr(disk_space, "free_bytes", monkeypatched)
    small = ["--ngram_buckets", "0"] if name == "finetune" else []
    with contextlib.chdir(ROOT), pytest.raises(UserError, match=r"a checkpoint takes about 0\.\d MB, and 0\.0 MB are"):
        recipe.main(["--preset", "smoke", "--output_dir", str(tmp_path), "--num_train_steps", "2", *small])
    assert not (tmp_path / "history.jsonl").exists()
    assert not list(tmp_path.glob("checkpoints/*"))


# While it is written -------------------------------------------------------------------------------------------------


def test_a_save_that_would_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "free_bytes", lambda path: 1e6)
    prepared = prepare(tiny_model(), LoopArguments(), Accelerator(cpu=True))
    save_checkpoint(tmp_path, TrainState(step=1), prepared)
    monkeypatch.setattr(manifest, "free_bytes", lambda path: 1e3)
    with pytest.raises(OSError, match=r"step-00000002 could not be written: .*not begun.*Older checkpoints are whole"):
        save_checkpoint(tmp_path, TrainState(step=2), prepared)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_full_disk_in_a_library_of_rust_is_a_checkpoint_that_could_not_be_written(tmp_path):
    def save(error):
        with written_whole(tmp_path / "step-1", num_bytes=0):
            raise error

    with pytest.raises(OSError, match=r"step-1 could not be written: No space left .* Older checkpoints are whole"):
        save(Exception("No space left on device (os error 28)"))
    with pytest.raises(KeyError):
        save(KeyError("a fault"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB, made by the system; and a function that leaves so many bytes of it free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system; test_checkpoint.py limits the size of files instead")

    def leave(free: int | None) -> None:
        (folder / "filler").unlink(missing_ok=True)
        if free is not None:
            room = shutil.disk_usage(folder).free
            (folder / "filler").write_bytes(bytes(max(0, room - free)))

    yield folder, leave
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def check_what_is_left(folder: Path, step: int) -> None:
    """After a full disk: one whole checkpoint, nothing unfinished, whole lines."""
    assert [step_of(path) for path in (folder / "checkpoints").iterdir()] == [step]
    assert newest_checkpoint(folder) is not None or (folder / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert not any(damages(path) for path in (folder / "checkpoints").iterdir())
    assert not list(folder.rglob(".partial*"))
    for line in (folder / "history.jsonl").read_text().split("\n")[:-1]:
        json.loads(line)


def test_a_disk_that_is_full_at_any_write_costs_no_checkpoint(small_disk, tmp_path, monkeypatch):
    """Pages of a tmpfs have 4 kB, and the files of this checkpoint 0.3 to 50."""
    folder, leave = small_disk
    settings = {"save_steps": 1, "eval_steps": 0, "logging_steps": 1, "save_total_limit": 1, "schedule": "constant"}
    straight = run(arguments(tmp_path / "straight", num_train_steps=2, **settings))["digest"]
    monkeypatch.setattr(manifest, "free_bytes", lambda path: math.inf)  # the write itself meets the end of the disk
    run(arguments(folder / "run", num_train_steps=1, **settings))
    (folder / "run" / "model.safetensors").unlink()
    shutil.copytree(folder / "run", tmp_path / "after-one-step")
    refused = 0
    for free in range(0, 200_000, 12_000):
        shutil.rmtree(folder / "run")
        shutil.copytree(tmp_path / "after-one-step", folder / "run")
        leave(free)
        if error := error_of(lambda: run(arguments(folder / "run", num_train_steps=2, **settings))):
            refused += 1
            assert "make room" in str(user_message(error)), repr(error)
            check_what_is_left(folder / "run", max(map(step_of, (folder / "run" / "checkpoints").iterdir())))
        leave(None)
        assert run(arguments(folder / "run", num_train_steps=2, **settings))["digest"] == straight
        assert digest(AutoModelForCausalLM.from_pretrained(folder / "run")) == straight
    assert refused > 5


def error_of(body) -> Exception | None:
    """What `body` raises: each library has another class for a full disk."""
    try:
        body()
    except Exception as error:
        return error
    return None


@pytest.mark.slow
def test_a_fine_tuning_run_on_a_full_disk_keeps_its_checkpoint(small_disk, monkeypatch):
    from recipes import finetune

    folder, leave = small_disk
    monkeypatch.setattr(manifest, "free_bytes", lambda path: math.inf)
    sizes = ["--hidden_size", "16", "--vocab_size", "300", "--num_hidden_layers", "1", "--save_total_limit", "1"]
    sizes += ["--ngram_buckets", "0"]
    argv = ["--preset", "smoke", *sizes, "--output_dir", str(folder / "run"), "--disable_tqdm", "true"]
    argv += ["--num_train_steps", "2", "--save_steps", "1", "--eval_steps", "0", "--logging_steps", "1"]

    for free in (0, 60_000, 200_000):
        with monkeypatch.context() as patch, contextlib.chdir(ROOT):

            def before_a_save(model, step, free=free):
                leave(free if step == 2 else None)

            patch.setattr("bmtk.training.trainer_patches.refuse_broken_weights", before_a_save)
            error = error_of(lambda: finetune.main(argv))
        assert "make room" in str(user_message(error)), repr(error)
        check_what_is_left(folder / "run", 1)
        leave(None)
    with contextlib.chdir(ROOT):
        finetune.main(argv)
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_line_of_history_that_does_not_fit_is_taken_back(small_disk):
    folder, leave = small_disk
    history = History(folder)
    history.append({"step": 1, "text": "x" * 3000})
    leave(0)
    with pytest.raises(OSError, match="No space left") as full:
        history.append({"step": 2, "text": "x" * 9000})  # the rest of the page is there, and no other page
    assert "make room" in str(user_message(full.value))
    assert [record["step"] for record in history.read()] == [1]
    leave(None)
    history.append({"step": 2})
    assert [record["step"] for record in history.read()] == [1, 2]


@pytest.mark.parametrize("write", ["torch", "safetensors", "tokenizers", "numpy", "python"])
def test_a_full_disk_is_one_message_whoever_reports_it(write, small_disk):
    import numpy as np
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    folder, leave = small_disk
    leave(20_000)
    words = {f"word{number}": number for number in range(20_000)}
    writers = {
        "torch": lambda: torch.save(torch.ones(90_000), folder / "x"),
        "safetensors": lambda: save_file({"x": torch.ones(90_000)}, folder / "x"),
        "tokenizers": lambda: Tokenizer(models.WordLevel(words, unk_token="word0")).save(str(folder / "x")),
        "numpy": lambda: np.ones(90_000).tofile(folder / "x"),
        "python": lambda: (folder / "x").write_bytes(bytes(90_000)),
    }
    message = str(user_message(error_of(writers[write])))
    remedy = "\nthe disk is full: make room, then run the same command again; what was saved before is whole"
    assert message.endswith(remedy)


def test_a_quota_is_a_full_disk_and_a_broken_archive_is_not():
    assert "make room" in str(user_message(OSError(errno.EDQUOT, "Disc quota exceeded")))  # as macOS spells it
    assert "make room" in str(user_message(Exception("Disk quota exceeded (os error 122)")))
    assert "make room" not in str(user_message(OSError(13, "Permission denied")))
    assert (
        user_message(RuntimeError("PytorchStreamReader failed reading zip archive: [inline_container.cc:145]")) is None
    )


# Rotation ------------------------------------------------------------------------------------------------------------


def damage(folder: Path, draw: random.Random) -> None:
    path = draw.choice([folder / "weights", folder / MANIFEST])
    if draw.random() < 0.5:
        path.unlink(missing_ok=True)
    elif path.exists():
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("prefix", ["step-", "checkpoint-"])
def test_rotation_never_deletes_the_best_or_the_last_good_checkpoint(prefix, tmp_path, monkeypatch):
    """Random sequences of saves, damages and resumptions, whatever is damaged: of any age, and several at a time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for seed in range(20):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        keep, step, best = draw.randint(1, 3), 0, None
        for _ in range(25):
            step += 1
            with written_whole(folder / f"{prefix}{step}", num_bytes=10) as beside:
                (beside / "weights").write_bytes(bytes(10))
            best = step if draw.random() < 0.2 else best
            before = {step_of(path): not damages(path) for path in folder.glob(f"{prefix}*")}
            delete_older(folder, prefix, step=step, keep=keep, best=best)
            left = {step_of(path): not damages(path) for path in folder.glob(f"{prefix}*")}
            whole = sorted((one for one, is_whole in before.items() if is_whole and one <= step), reverse=True)
            assert set(whole[:keep]) <= set(left), "the newest whole ones"
            assert best is None or best not in before or best in left
            assert {one for one in before if one > step} <= set(left), "a later one is damaged, and may be restored"
            assert sum(left[one] for one in left if one <= step) <= keep + 1, "no more than is wanted, and the best"
            assert not list(folder.glob(".partial*"))
            for path in list(folder.glob(f"{prefix}*")):
                if draw.random() < 0.25 and any(left[one] for one in left if one != step_of(path)):
                    damage(path, draw)
                    left[step_of(path)] = not damages(path)
            whole = sorted(one for one, is_whole in left.items() if is_whole)
            if draw.random() < 0.4:  # killed, and resumed from the newest whole one, or from one that is named
                step = whole[-1] if draw.random() < 0.7 else draw.choice(whole)
            if best is not None and not left.get(best, False):
                best = None
