"""recipes/finetune.py: too little memory makes micro-batches smaller, and changes nothing that is learned."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bmtk.errors import UserError
from bmtk.training import callbacks
from bmtk.training import trainer as trainer_module
from recipes import finetune

ROOT = Path(__file__).parent.parent
TOO_LITTLE = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
SETTINGS = ["--max_steps", "6", "--eval_strategy", "no", "--logging_steps", "1", "--save_steps", "2", "--skip_test"]
SETTINGS += ["--batch_size", "16", "--precision", "fp32", "--save_total_limit", "9"]


def run(folder: Path, *argv) -> Path:
    with contextlib.chdir(ROOT):
        finetune.main(["--preset", "smoke", "--output_dir", str(folder), "--disable_tqdm", "true", *SETTINGS, *argv])
    return folder


@pytest.fixture
def memory(monkeypatch):
    """A function that lets all runs have memory for so many rows from step `first` (counted from 0) on."""
    build = trainer_module.build_trainer

    def limit(rows: int, *, first: int = 0, in_backward: bool = False) -> None:
        def fail(gradient):
            raise RuntimeError(TOO_LITTLE)

        def limited(model, *args, **kwargs):
            trainer = build(model, *args, **kwargs)

            def refuse(module, inputs, given, outputs):
                if not module.training or len(given["input_ids"]) <= rows or trainer.state.global_step < first:
                    return
                if not in_backward:
                    fail(None)
                outputs.reader_logits[0].register_hook(fail)

            model._forward_hooks.clear()
            model.register_forward_hook(refuse, with_kwargs=True)
            return trainer

        monkeypatch.setattr(trainer_module, "build_trainer", limited)

    yield limit
    monkeypatch.undo()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def limits(folder: Path) -> list[list[int]]:
    return json.loads((folder / "micro_batches.json").read_text())["limits"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "run", "--hidden_dropout", "0")


@pytest.mark.parametrize(("cut", "in_backward"), [([], False), (["--micro_batch_size", "8"], True)])
def test_a_step_that_does_not_fit_is_made_in_smaller_parts(cut, in_backward, whole, memory, caplog, tmp_path):
    memory(5, first=1, in_backward=in_backward)
    folder = run(tmp_path / "run", "--hidden_dropout", "0", *cut)
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-6)
    torch.testing.assert_close(weights(folder), weights(whole), rtol=1e-5, atol=1e-6)
    assert limits(folder) == ([[1, 4]] if cut else [[1, 8], [1, 4]])
    assert "step 2: out of memory with 8 rows in a forward pass; from now on 4 rows" in caplog.text


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_has_the_sizes_of_the_one_before(stop, memory, tmp_path, monkeypatch):
    settings = ["--micro_batch_size", "8", "--hidden_dropout", "0.1"]
    memory(5, first=3, in_backward=True)
    straight = run(tmp_path / "straight", *settings)
    assert limits(straight) == [[3, 4]]

    def break_off(self, args, state, control, **kwargs):
        if state.global_step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.RecordHistory, "on_save", break_off, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", *settings)
    run(tmp_path / "run", *settings)
    assert losses(tmp_path / "run") == losses(straight)
    ours, theirs = weights(tmp_path / "run"), weights(straight)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def test_a_step_that_is_begun_again_draws_the_same_numbers(memory, tmp_path):
    settings = ["--micro_batch_size", "8", "--hidden_dropout", "0.1", "--max_steps", "2"]
    known, found = tmp_path / "known", tmp_path / "found"
    known.mkdir()
    (known / "micro_batches.json").write_text('{"limits": [[1, 4]]}')
    memory(5, first=1, in_backward=True)
    run(known, *settings)
    run(found, *settings)
    assert limits(found) == limits(known)
    assert losses(found) == losses(known)
    assert all(torch.equal(value, weights(found)[name]) for name, value in weights(known).items())


def test_auto_finds_what_fits_and_the_plan_shows_it(whole, memory, tmp_path, capsys, monkeypatch):
    memory(5)
    folder = run(tmp_path / "run", "--micro_batch_size", "auto", "--hidden_dropout", "0")
    assert limits(folder) == [[0, 4]]
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-6)
    capsys.readouterr()
    run(folder, "--micro_batch_size", "auto", "--hidden_dropout", "0", "--dry_run")
    assert "rows per forward pass  4\n" in capsys.readouterr().out


def test_one_row_that_does_not_fit_is_an_error_with_remedies(memory, tmp_path):
    memory(0)
    with pytest.raises(UserError, match="step 1: out of memory with 1 row in a forward pass: set gradient_checkpoint"):
        run(tmp_path / "run", "--micro_batch_size", "2")
