"""`recipes/pretrain.py --size --budget`: what is derived, printed, kept by a resumed run, and what is refused."""

import hashlib
import json
import re

import pytest

from bmtk.arguments import read_yaml
from bmtk.errors import UserError
from bmtk.training import dial
from bmtk.training.profiling import Rehearsal
from recipes import pretrain


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The options for a small text of one's own."""
    folder = tmp_path_factory.mktemp("text")
    words = [f"{noun} {verb} {noun}\n" for noun in ("cat", "dog", "hen", "fox") for verb in ("sees", "finds", "hears")]
    parts = {name: folder / f"{name}.txt" for name in ("train", "validation")}
    for number, (name, path) in enumerate(parts.items()):
        path.write_text("".join(f"{name} {i} {words[(i * (7 + number)) % 12]}" for i in range(600)))
    return [f"--{name}_file={path}" for name, path in parts.items()]


def sized(text, folder, *argv):
    return [*text, "--size", "100K", "--leakage", "allow", "--sample_tokens", "0", "--output_dir", str(folder), *argv]


def notes(capsys):
    return [line[6:] for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


def test_a_plan_says_what_follows_from_a_size(text, tmp_path, capsys):
    pretrain.main(sized(text, tmp_path / "run", "--dry_run"))
    out = capsys.readouterr().out
    assert re.search(r"note: size 100K: vocab_size=512 = 1024 \(N / 1M\)\^0\.6, .*context_length=128 = 256", out)
    assert re.search(r"note: shape: bm_transformer with num_hidden_layers=\d+, .*% beside the size", out)
    assert re.search(r"note: tokens: [\d.]+K, 4 times the [\d.]+K that the data have", out)
    assert re.search(r"note: training: optimizer=muon; .*learning_rate=0\.\d+ = 0\.01 \(128 / width\)\^0\.5", out)
    assert re.search(r"\n  FLOPs +\d\.\d+e\+1\d\n  memory +at least \d+ MB ", out)
    assert re.search(r"\n  steps +[\d,]+ \(4 epochs\)\n", out)
    assert "given by hand" not in out
    assert not (tmp_path / "run").exists()


def test_a_short_text_has_a_small_vocabulary(text, tmp_path, capsys):
    sizes = ["--model_type", "bm_cnn", "--size", "1M", "--output_dir", str(tmp_path / "run"), "--dry_run"]
    pretrain.main([*text, "--leakage", "allow", *sizes])
    assert "vocab_size=512 = 1024 (N / 1M)^0.6, N no more than a 15th of the bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "model_type"),
    [("causal_lm", "bm_cnn"), ("causal_lm", "bm_rnn"), ("masked_lm", "bm_transformer"), ("denoising", "bm_rnn")],
)
def test_families_and_objectives_over_tokens_have_sizes(task, model_type, text, tmp_path, capsys):
    argv = [word for word in sized(text, tmp_path / "run") if word not in ("--sample_tokens", "0")]
    pretrain.main([*argv, "--task", task, "--model_type", model_type, "--dry_run"])
    found = re.search(r"\n  parameters +([\d,]+) ", capsys.readouterr().out)
    assert int(found[1].replace(",", "")) == pytest.approx(1e5, rel=0.1)


def test_what_file_and_command_line_give_wins_and_is_named(text, tmp_path, capsys):
    config = tmp_path / "my.yaml"
    config.write_text("task: causal_lm\nhidden_size: 64\nlearning_rate: 5e-4\nvocab_size: 300\n")
    argv = [*sized(text, tmp_path / "run"), "--config", str(config), "--batch_size", "6", "--dry_run"]
    pretrain.main(argv)
    out = capsys.readouterr().out
    assert "note: given by hand, and kept: vocab_size=300, hidden_size=64\n" in out
    assert re.search(r"note: given by hand, and kept: .*batch_size=6", out)
    assert re.search(r"note: given by hand, and kept: .*learning_rate=0\.0005", out)
    shown = dict(re.findall(r"\n  (\w+) {2,}(\S+)", out))
    kept = {name: shown[name] for name in ("vocab_size", "hidden_size", "batch_size", "learning_rate")}
    assert kept == {"vocab_size": "300", "hidden_size": "64", "batch_size": "6", "learning_rate": "0.0005"}


def test_the_default_file_gives_its_data_and_nothing_else(text):
    _, data, args, dial_args, _, architecture = pretrain.read_arguments(["--size", "3M", "--model_type", "bm_rnn"])
    assert data.data_name == "tiny Shakespeare"
    assert (data.tokenizer, data.context_length, args.output_dir) == ("byte_bpe", 256, "outputs/bm_rnn-3M")
    assert set(vars(architecture).values()) == {None}
    assert not {"learning_rate", "batch_size", "num_train_epochs"} & dial_args.given.keys()


def test_a_resumed_run_keeps_the_steps_that_were_derived_at_its_start(text, tmp_path, monkeypatch, capsys):
    argv = ["--budget", "0.4s", "--save_steps", "1000", "--eval_steps", "0", "--precision", "fp32"]
    monkeypatch.setattr(dial, "rehearse", lambda *_: Rehearsal(seconds=0.04, num_steps=3, num_bytes=0))
    with pytest.raises(SystemExit):
        pretrain.main([*sized(text, tmp_path / "run", *argv), "--max_minutes", "1e-5"])
    derived = json.loads((tmp_path / "run" / "derived.json").read_text())
    monkeypatch.setattr(dial, "rehearse", None)  # is not called again
    pretrain.main(sized(text, tmp_path / "run", *argv))
    assert any(line.startswith("derived when this run began, and kept: ") for line in notes(capsys))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    settings = {**derived["architecture"], **derived["training"]}
    assert {name: record["config"][name] for name in settings} == settings
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert history[-1]["step"] == settings["num_train_steps"] == 10
    pretrain.main(sized(text, tmp_path / "run", *argv))  # complete: nothing is trained
    assert "was complete before" in capsys.readouterr().out

    again = read_yaml(tmp_path / "run" / "recipe.yaml")
    assert "budget" not in again
    pretrain.main(["--config", str(tmp_path / "run" / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    one, other = (
        hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() for name in ("run", "again")
    )
    assert one == other


def test_every_task_has_budgets(tmp_path, capsys):
    argv = ["--task", "masked_image_modeling", "--preset", "smoke", "--num_train_steps", "null"]
    pretrain.main([*argv, "--budget", "1h", "--output_dir", str(tmp_path / "run"), "--dry_run"])
    assert re.search(
        r"note: budget 1h: [\d.]+ ms a step, the mean of \d+ measured now: (\d+) of \1 steps", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "5X"], r"size='5X' is no number of parameters"),
        (["--preset", "smoke", "--budget", "soon", "--num_train_steps", "null"], r"budget='soon' is no time"),
        (["--preset", "smoke", "--budget", "5min"], r"budget=5min and num_train_steps=30 both say how long to train"),
        (["--size", "1M", "--model", "x"], r"size=1M makes a new shape, and model=x has its own; leave one out"),
        (["--size", "1M", "--model_type", "bm_cnn", "--preset_model", "kim-cnn"], r"and preset_model=kim-cnn has its"),
        (["--size", "1M", "--model_type", "gpt2"], r"size=1M knows the shapes of bm_cnn, bm_rnn, bm_transformer, not"),
        (["--size", "1M", "--task", "masked_image_modeling"], r"size=1M counts in tokens, and this task reads none"),
    ],
)
def test_what_does_not_go_together_is_one_clear_error(argv, message):
    with pytest.raises(UserError, match=message):
        pretrain.main(argv)
