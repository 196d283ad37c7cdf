"""What the same command does again: goes on with the same data only, leaves a finished run alone, deletes no input."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bmtk.errors import UserError
from bmtk.training.signals import Stopped
from recipes import finetune, pretrain

ROOT = Path(__file__).parent.parent
TRAIN = "the cat sat on the mat and the dog sat on the cat\n" * 40
WORDS = "good fine kind warm bright bad dull cold stale dirty".split()
STEPS = ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1"]  # of 4 in an epoch


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def text_files(folder):
    folder.mkdir(exist_ok=True)
    for split, text in {"train": TRAIN, "validation": "a dog and a cat\n" * 40}.items():
        (folder / f"{split}.txt").write_text(text)
    return folder


def tables(folder):
    folder.mkdir(exist_ok=True)
    for split, count in {"train": 32, "validation": 8}.items():
        rows = [f"the {split} {row} was {WORDS[row % 10]},{int(row % 10 < 5)}" for row in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


def pretrained(data, out, *argv):
    files = ["--train_file", str(data / "train.txt"), "--validation_file", str(data / "validation.txt")]
    sizes = ["--num_train_steps", "2", "--context_length", "16", "--batch_size", "2", "--vocab_size", "60"]
    pretrain.main(["--preset", "smoke", *files, *sizes, "--tokenizer", "word", "--output_dir", str(out), *argv])
    return out


def finetuned(data, out, *argv, steps=STEPS):
    files = ["--train_file", str(data / "train.csv"), "--validation_file", str(data / "validation.csv")]
    sizes = ["--batch_size", "8", "--disable_tqdm", "true", *steps]
    finetune.main(["--preset", "smoke", *files, *sizes, "--output_dir", str(out), *argv])
    return out


RUNS = pytest.mark.parametrize(
    ("make", "run"), [(text_files, pretrained), (tables, finetuned)], ids=["pretrain", "finetune"]
)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@RUNS
def test_a_finished_run_shows_its_results_and_stays_as_it_is(make, run, tmp_path, capsys):
    data, out = make(tmp_path / "data"), tmp_path / "run"
    run(data, out)
    before, first = bytes_of(out), capsys.readouterr().out
    for path in data.iterdir():  # read again, as its time is another, and found to be the same
        os.utime(path)
    run(data, out)
    after, shown = bytes_of(out), capsys.readouterr().out
    assert after == before
    assert "finished: the run in" in shown
    assert f"--model {out}" in shown
    loss = next(line for line in first.splitlines() if "alidation loss  " in line or "erplexity  " in line)
    assert loss in shown


@RUNS
def test_a_run_whose_training_is_done_is_evaluated_without_another_step(make, run, tmp_path):
    data, out = make(tmp_path / "data"), tmp_path / "run"
    run(data, out)
    weights, history = load_file(out / "model.safetensors"), (out / "history.jsonl").read_text()
    for name in ("run.json", "report.html", "model.safetensors"):
        (out / name).unlink()
    run(data, out)
    again = load_file(out / "model.safetensors")
    assert all(again[name].equal(value) for name, value in weights.items())
    steps = [json.loads(line)["step"] for line in (out / "history.jsonl").read_text().splitlines()]
    assert max(steps) == max(json.loads(line)["step"] for line in history.splitlines())


@RUNS
def test_other_data_are_refused_before_anything_is_made_of_them(make, run, tmp_path):
    data, out = make(tmp_path / "data"), tmp_path / "run"
    run(data, out)
    train = next(data.glob("train.*"))
    train.write_text(train.read_text().replace("cat", "cow").replace("good,1", "good,0"))
    before = bytes_of(out), sorted(out.rglob("*"))
    with pytest.raises(UserError) as refused:
        run(data, out)
    changed = "1 of 1 files changed, first file 1" if run is pretrained else "4 of 32 rows changed, first row 1"
    assert f"learned from other data:\n  train: {changed}" in str(refused.value)
    assert f"model={out} to train its weights on" in str(refused.value)
    assert "overwrite_output_dir" in str(refused.value)
    assert (bytes_of(out), sorted(out.rglob("*"))) == before
    run(data, tmp_path / "other", "--model", str(out))  # the remedies
    run(data, out, "--overwrite_output_dir", "true")
    run(data, out)


def test_another_tokenizer_of_the_same_name_is_refused(tmp_path):
    data, out, named = text_files(tmp_path / "data"), tmp_path / "run", tmp_path / "tokenizer"
    pretrained(data, tmp_path / "first")
    shutil.copytree(tmp_path / "first" / "corpus" / "tokenizer", named)
    pretrained(data, out, "--tokenizer", str(named))
    pretrained(data, tmp_path / "second", "--vocab_size", "9")
    shutil.rmtree(named)
    shutil.copytree(tmp_path / "second" / "corpus" / "tokenizer", named)
    with pytest.raises(UserError, match="learned from other data:\n  another tokenizer\n"):
        pretrained(data, out, "--tokenizer", str(named))


def test_a_damaged_tokenizer_of_the_corpus_is_trained_again(tmp_path, caplog):
    data, out = text_files(tmp_path / "data"), tmp_path / "run"
    pretrained(data, out)
    file = out / "corpus" / "tokenizer" / "tokenizer.json"
    right = file.read_text()
    for wrong in (right.replace('"cat"', '"cow"'), right[: len(right) // 2]):
        file.write_text(wrong)
        (out / "run.json").unlink()
        pretrained(data, out)
        assert f"the tokenizer in {file.parent} is damaged" in caplog.text
        assert file.read_text() == right
        caplog.clear()


def test_a_longer_run_is_refused_with_the_way_to_train_on(tmp_path):
    data, out = tables(tmp_path / "data"), tmp_path / "run"
    finetuned(data, out)
    with pytest.raises(UserError, match=f"max_steps: 3 there, 5 now\nchoose another output_dir and model={out} to tr"):
        finetuned(data, out, "--max_steps", "5")


@pytest.mark.parametrize("key", ["model", "tokenizer", "train_file"])
def test_overwriting_deletes_no_input(key, tmp_path, monkeypatch):
    data, out = tables(tmp_path / "data"), tmp_path / "run"
    finetuned(data, out)
    (out / "checkpoints" / "train.csv").write_bytes((data / "train.csv").read_bytes())
    before = bytes_of(out)
    monkeypatch.chdir(tmp_path)
    value = {"model": "run", "tokenizer": "run", "train_file": "run/checkpoints/train.csv"}[key]
    with pytest.raises(UserError, match=rf"{key}='{value}' is in output_dir=.*overwrite_output_dir would delete"):
        finetuned(data, out, "--overwrite_output_dir", "true", f"--{key}", value)
    assert bytes_of(out) == before


@RUNS
def test_a_run_that_has_used_its_time_goes_on_to_the_very_same_weights(make, run, tmp_path, caplog):
    data = make(tmp_path / "data")
    whole, out = run(data, tmp_path / "whole"), tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        run(data, out, "--max_minutes", "0.001")
    assert stopped.value.code == 124
    assert re.search(r"stopped after step 1 of \d: saved; run the same command again to resume", caplog.text)
    assert len(list((out / "checkpoints").iterdir())) == 1
    assert not (out / "run.json").exists()
    run(data, out)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert all(ours[name].equal(value) for name, value in theirs.items())


def test_a_signal_in_the_final_evaluation_loses_no_weights(tmp_path, monkeypatch):
    data, out = tables(tmp_path / "data"), tmp_path / "run"

    def interrupted(trainer):
        raise Stopped(143)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "evaluate", interrupted)
        with pytest.raises(Stopped):
            finetuned(data, out, steps=["--max_steps", "3", "--save_strategy", "no"])
    stopped = load_file(out / "model.safetensors")
    whole = load_file(finetuned(data, tmp_path / "whole") / "model.safetensors")
    assert all(stopped[name].equal(value) for name, value in whole.items())
