"""recipes/finetune.py and recipes/evaluate.py: what they leave, what they report, and that a stop changes nothing."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainerState,
    pipeline,
)

from bmtk.data.tables import read_table
from bmtk.data.tokenizers import train_tokenizer
from bmtk.tasks.objective import Objective
from bmtk.training import callbacks
from bmtk.training.adapters import AdapterArguments, add_adapter
from bmtk.training.finetuning_arguments import choose_best_by
from bmtk.training.trainer import check_whole_weights
from recipes import evaluate, finetune, predict

ROOT = Path(__file__).parent.parent
REVIEWS = ROOT / "recipes" / "data" / "reviews"
LORA = ["--adapter", "lora", "--lora_rank", "4", "--learning_rate", "0.003", "--num_train_epochs", "6"]
SHORT = ["--num_train_epochs", "2", "--warmup_steps", "0"]
LONG = ["--num_train_epochs", "12"]  # until no test row is in doubt, whatever the seed


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(folder, *argv):
    finetune.main(["--preset", "smoke", "--output_dir", str(folder), "--disable_tqdm", "true", *map(str, argv)])
    return folder


def facts(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, seed_argv):
    """The folder of a finished run of the smoke preset, twice as long."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        return run(tmp_path_factory.mktemp("finetuned") / "run", *LONG, *seed_argv)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny BERT without a head, and a tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(read_table([REVIEWS / "train.csv"])["text"], kind="byte_bpe", vocab_size=400)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=64, **sizes)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.trains
def test_the_smoke_run_learns_and_leaves_a_repository(finetuned):
    names = {path.name for path in finetuned.iterdir()}
    assert names >= {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "report.html"),
        *("modeling_bm_transformer.py", "heads_bm.py", "run.json", "history.jsonl", "recipe.yaml"),
    }
    assert "training_args.bin" not in names
    run_facts = facts(finetuned)
    assert run_facts["metrics"]["test/accuracy"] == 1.0
    assert run_facts["metrics"]["test/macro_f1"] == 1.0
    assert run_facts["data"]["labels"] == ["negative", "positive"]
    assert run_facts["data"]["train"]["rows"] == 320
    assert run_facts["model"]["saved_as"] == "model"
    classify = pipeline("text-classification", model=str(finetuned))
    assert classify("The garden was lovely and the bread was fresh.")[0]["label"] == "positive"
    assert classify("The garden was dirty and the bread was stale.")[0]["label"] == "negative"


@pytest.mark.trains
def test_the_history_holds_training_and_one_evaluation_an_epoch(finetuned):
    rows = history(finetuned)
    assert [row["step"] for row in rows if "validation/loss" in row] == list(range(20, 241, 20))
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(5, 241, 5))
    assert training[-1]["loss"] < 0.2 < training[0]["loss"]
    num_tokens = facts(finetuned)["data"]["train"]["tokens"]
    assert training[-1]["tokens"] == 12 * num_tokens
    seconds = [row["seconds"] for row in training]
    assert seconds == sorted(seconds)


def test_the_same_command_again_finds_the_run_complete(finetuned, capsys):
    before = (finetuned / "model.safetensors").read_bytes(), history(finetuned)
    run(finetuned, *LONG)
    assert ((finetuned / "model.safetensors").read_bytes(), history(finetuned)) == before
    assert "finished: the run in " in capsys.readouterr().out


def test_the_resolved_config_repeats_the_run(finetuned, tmp_path):
    finetune.main(["--config", str(finetuned / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (finetuned, tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("stop_at", "saving"),
    [
        (7, ["--load_best_model_at_end", "true"]),
        (40, ["--save_strategy", "steps", "--save_steps", "1000"]),
        (27, ["--ema_decay", "0.9", "--load_best_model_at_end", "true"]),
        (13, ["--unfreeze_epochs", "0.5", "--l1_penalty", "1e-3", "--gradient_accumulation_steps", "2"]),
        (7, ["--optimizer", "muon", "--learning_rate", "1e-3", "--layer_lr_decay", "0.8"]),
    ],
    ids=["within an epoch", "at the very end, where nothing else saves", "averaged", "unfrozen", "with Muon"],
)
def test_a_stopped_run_goes_on_to_the_very_same_weights(stop_at, saving, tmp_path, monkeypatch):
    settings = [*SHORT, "--hidden_dropout", "0.1", "--token_dropout", "0.2", "--logging_steps", "1", *saving]
    whole = run(tmp_path / "whole", *settings)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.RecordHistory, "on_step_begin", lambda *args, **kwargs: None, raising=False)
        patch.setattr(callbacks.RecordHistory, "on_step_end", stop, raising=False)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "stopped", *settings)
    assert stopped.value.code == 143
    assert not (tmp_path / "stopped" / "config.json").exists()
    run(tmp_path / "stopped", *settings)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "stopped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    timeless = [
        [{key: value for key, value in row.items() if "second" not in key} for row in history(folder)]
        for folder in (whole, tmp_path / "stopped")
    ]
    assert timeless[0] == timeless[1]
    assert facts(whole)["metrics"] == facts(tmp_path / "stopped")["metrics"]


def learned(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that training changes: not the table of how tokens are spelled."""
    return {name: value for name, value in load_file(path).items() if value.is_floating_point()}


def test_the_projects_adamw_steps_as_trainers_own_where_nothing_is_decayed(tmp_path):
    steps = ["--max_steps", "4", "--adam_beta2", "0.9", "--adam_epsilon", "1e-4", "--weight_decay"]
    own, shared = run(tmp_path / "own", *steps, "0"), run(tmp_path / "shared", *steps, "0", "--optimizer", "adamw")
    ours, theirs = (learned(folder / "model.safetensors") for folder in (shared, own))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7)
    state = torch.load(shared / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert set(state) == set(theirs)
    decayed = learned(run(tmp_path / "decayed", *steps, "0.5", "--optimizer", "adamw") / "model.safetensors")
    changed = {name for name in theirs if not torch.allclose(decayed[name], theirs[name], rtol=1e-4)}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert json.loads((shared / "run_config.json").read_text())["optimizer"] == "adamw"


def test_the_vocabulary_of_the_own_loop_trains_what_trainers_names_train(tmp_path):
    shared = ["--num_train_steps", "4", "--batch_size", "8", "--micro_batch_size", "4", "--schedule", "constant"]
    trainers = ["--max_steps", "4", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    trainers += ["--lr_scheduler_type", "constant_with_warmup"]
    one = run(tmp_path / "one", *shared, "--eval_steps", "2", "--save_steps", "2", "--precision", "fp32")
    steps = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
    other = run(tmp_path / "other", *trainers, *steps)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert [row["step"] for row in history(one) if "validation/loss" in row] == [2, 4]
    assert sorted(path.name for path in (one / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    config = facts(one)["config"]
    assert (config["batch_size"], config["micro_batch_size"], config["schedule"]) == (8, 4, "constant")
    assert not {"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"} & set(config)
    recipe = one / "recipe.yaml"
    finetune.main(["--config", str(recipe), "--output_dir", str(tmp_path / "again"), "--disable_tqdm", "true"])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


def test_layers_of_trainers_own_optimizer_move_by_their_depth(tmp_path):
    sgd = ["--optim", "sgd", "--max_steps", "1", "--warmup_steps", "0", "--learning_rate"]
    runs = {"start": ["0"], "flat": ["1e-2"], "falling": ["1e-2", "--layer_lr_decay", "0.5"]}
    start, flat, falling = (
        learned(run(tmp_path / name, *sgd, *argv) / "model.safetensors") for name, argv in runs.items()
    )
    for name in start:
        depth = 2 - int(name.split(".")[2]) if "layers" in name else 3 if ".stem." in name else 0
        moved = (flat[name] - start[name]) * 0.5**depth
        torch.testing.assert_close(falling[name] - start[name], moved, rtol=1e-2, atol=1e-6)


def test_frozen_layers_stay_as_they_are_until_their_turn(tmp_path):
    steps = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "20", "--max_steps", "7"]
    folder = run(tmp_path / "run", *steps, "--unfreeze_epochs", "0.1", "--weight_decay", "0.5")  # two steps of 20
    weights = [learned(folder / "checkpoints" / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 8)]
    for name in weights[0]:
        turn = 3 - int(name.split(".")[2]) if "layers" in name else 4 if ".stem." in name else 1
        for step in range(1, 7):
            moved = not torch.equal(weights[step][name], weights[step - 1][name])
            assert moved == (step >= 2 * (turn - 1)), (name, step)


def turning(folder: Path, *, num_right: int) -> list[str]:
    """Arguments that read the reviews in their order, of which only the first ones have their own labels.

    What a trained model knows it unlearns from the others: the end is not its best moment, whatever its numbers.
    """
    other, lines = {"negative": "positive", "positive": "negative"}, []
    for place, row in enumerate(read_table([REVIEWS / "train.csv"])):
        label = row["label"] if place < num_right else other[row["label"]]
        lines.append(json.dumps({"text": row["text"], "label": label}))
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = ["--train_file", str(folder / "train.jsonl"), "--train_sampling_strategy", "sequential"]
    return [*files, "--validation_file", str(REVIEWS / "validation.csv"), "--test_file", str(REVIEWS / "test.csv")]


@pytest.fixture(scope="module")
def impatient(finetuned, tmp_path_factory, seed_argv):
    """Folders of a whole run that gets worse in the end, and of one that ends early; and the latter's settings."""
    folder = tmp_path_factory.mktemp("impatient")
    settings = ["--eval_strategy", "steps", "--eval_steps", "4", "--save_strategy", "steps", "--save_steps", "4"]
    settings += ["--max_steps", "24", "--metric_for_best_model", "loss", "--learning_rate", "0.003"]
    settings += ["--logging_steps", "1", "--model", str(finetuned), *turning(folder, num_right=128), *seed_argv]
    patient = [*settings, "--early_stopping_patience", "2"]
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        return run(folder / "whole", *settings, "--save_total_limit", "99"), run(folder / "early", *patient), patient
    finally:
        os.chdir(before)


@pytest.mark.trains
def test_a_run_ends_early_with_the_best_model(impatient):
    whole, early, _ = impatient
    losses = [row["validation/loss"] for row in history(whole) if "validation/loss" in row]
    best = next(place for place, value in enumerate(losses) if min(losses[place : place + 3]) == value)
    assert best < len(losses) - 3
    assert [row["validation/loss"] for row in history(early) if "validation/loss" in row] == losses[: best + 3]
    ours = load_file(early / "model.safetensors")
    theirs = load_file(whole / "checkpoints" / f"checkpoint-{4 * (best + 1)}" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert facts(early)["metrics"]["validation/loss"] == pytest.approx(losses[best], abs=1e-7)


def test_a_run_that_ended_early_has_ended_and_one_that_was_stopped_goes_on_counting(impatient, tmp_path, monkeypatch):
    _, early, settings = impatient
    before = (early / "model.safetensors").read_bytes(), history(early)
    run(early, *settings)
    assert ((early / "model.safetensors").read_bytes(), history(early)) == before
    last = history(early)[-1]["step"]

    def stop(self, args, state, control, **kwargs):
        if state.global_step == last - 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.RecordHistory, "on_step_begin", lambda *args, **kwargs: None, raising=False)
        patch.setattr(callbacks.RecordHistory, "on_step_end", stop, raising=False)
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped", *settings)
    run(tmp_path / "stopped", *settings)
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == before[0]
    assert [row["step"] for row in history(tmp_path / "stopped")] == [row["step"] for row in before[1]]


BEST = ["--load_best_model_at_end", "true", "--metric_for_best_model"]


@pytest.mark.parametrize(
    ("argv", "metric", "is_greater_better"),
    [
        ([], None, None),
        (BEST[:2], "accuracy", True),
        ([*BEST, "eval_loss"], "eval_loss", False),
        ([*BEST, "original_mae"], "original_mae", False),
        ([*BEST, "weighted_quantile_loss"], "weighted_quantile_loss", False),
        ([*BEST, "image_to_text_mean_rank"], "image_to_text_mean_rank", False),
        ([*BEST, "bits_per_byte"], "bits_per_byte", False),
        ([*BEST, "r2"], "r2", True),
        ([*BEST, "r2", "--greater_is_better", "false"], "r2", False),
        (["--save_strategy", "best", "--metric_for_best_model", "mse"], "mse", False),
        (["--save_strategy", "best"], "accuracy", True),
    ],
)
def test_the_best_model_has_the_lowest_error_and_the_highest_of_all_else(argv, metric, is_greater_better):
    args = finetune.read_arguments(["--preset", "smoke", *argv])[2]
    choose_best_by(args, "accuracy", among={"accuracy", str(metric).removeprefix("eval_")})
    assert (args.metric_for_best_model, args.greater_is_better) == (metric, is_greater_better)


def test_a_rate_is_not_looked_for_with_another_optimizer():
    with pytest.raises(ValueError, match=r"find_lr has no adafactor, .* set optimizer to one of adamw, muon, sgd"):
        finetune.main(["--preset", "smoke", "--find_lr", "--optim", "adafactor"])


def test_a_checkpoint_without_what_a_run_goes_on_with_cannot_be_asked_for():
    with pytest.raises(ValueError, match="unknown key 'save_only_model'"):
        finetune.read_arguments(["--preset", "smoke", "--save_only_model", "true"])


def test_a_rate_falls_where_the_main_metric_is_on_a_plateau(tmp_path):
    plateau = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", '{"patience": 0}']
    steps = ["--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--logging_steps", "1"]
    folder = run(tmp_path / "run", *steps, *plateau, "--learning_rate", "1e-12")
    assert facts(folder)["config"]["metric_for_best_model"] == "accuracy"
    rates = [row["learning_rate"] for row in history(folder) if "learning_rate" in row]
    assert rates[-1] == pytest.approx(1e-13)


@pytest.mark.trains
def test_averaged_weights_are_evaluated_and_saved_and_raw_ones_trained(finetuned, tmp_path, seed_argv):
    steps = ["--max_steps", "8", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "9"]
    evaluations = [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--learning_rate",
        "0.01",
        "--warmup_steps",
        "0",
        "--model",
        str(finetuned),
    ]
    evaluations += ["--metric_for_best_model", "loss", *turning(tmp_path, num_right=0), *seed_argv]
    raw = run(tmp_path / "raw", *steps, *evaluations)
    best = run(tmp_path / "best", *steps, *evaluations, "--ema_decay", "0.5", "--load_best_model_at_end", "true")
    average = {1: learned(best / "checkpoints" / "checkpoint-1" / "averages.safetensors")}
    for step in range(2, 9):
        decay = min(0.5, (1 + step) / (10 + step))
        weights = learned(raw / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
        trained = learned(best / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
        assert all(torch.equal(trained[name], weights[name]) for name in weights)
        average[step] = {name: decay * average[step - 1][name] + (1 - decay) * weights[name] for name in weights}
    evaluated = [row for row in history(best) if "validation/loss" in row]
    chosen = min(evaluated, key=lambda row: row["validation/loss"])
    assert chosen["step"] < 8, "the last one would prove nothing"
    for name, value in learned(best / "model.safetensors").items():
        torch.testing.assert_close(value, average[chosen["step"]][name])
    assert chosen["validation/loss"] == pytest.approx(facts(best)["metrics"]["validation/loss"], abs=1e-7)
    assert evaluated[-1]["validation/loss"] != history(raw)[-1]["validation/loss"]


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path, caplog):
    folder = run(tmp_path / "run", *SHORT)
    checkpoints = folder / "checkpoints"
    (checkpoints / "checkpoint-40" / "trainer_state.json").write_text('{"global_', encoding="utf-8")
    (folder / "config.json").unlink()
    run(folder, *SHORT)
    damage = "checkpoint-40 is damaged: trainer_state.json has 9 bytes instead of "
    assert re.search(rf"{damage}\d+; it is passed over", caplog.text)
    assert [row["step"] for row in history(folder) if "validation/loss" in row] == [20, 40]
    with pytest.raises(ValueError, match="is not a folder with a whole checkpoint of Trainer; name one, or say true"):
        run(folder, *SHORT, "--resume_from_checkpoint", checkpoints / "checkpoint-39")


def test_a_run_that_shall_not_resume_loses_nothing_and_starts_where_nothing_is(tmp_path, capsys):
    folder, anew = tmp_path / "run", ["--max_steps", "2", "--resume_from_checkpoint", "False"]
    run(folder, *anew)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds checkpoints, .* resume_from_checkpoint=false would not go on with"):
        run(folder, *anew)
    assert (folder / "checkpoints" / "checkpoint-2").is_dir()
    capsys.readouterr()
    run(folder, *anew, "--overwrite_output_dir")
    assert "going on" not in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == before
    run(folder, "--max_steps", "2", "--resume_from_checkpoint", "true")
    assert f"going on from {folder / 'checkpoints' / 'checkpoint-2'}" in capsys.readouterr().out


def test_a_pretrained_decoder_keeps_its_trunk_under_a_new_head(pretrained, tmp_path, capsys):
    argv = [
        "--model",
        pretrained,
        "--num_train_epochs",
        "1",
        "--learning_rate",
        "0",
        "--lr_scheduler_type",
        "constant",
    ]
    folder = run(tmp_path / "run", *argv)
    printed = capsys.readouterr().out
    assert (
        f"note: NEWLY INITIALISED, to be learned from these data: score.bias, score.weight (not in {pretrained})"
        in printed
    )
    assert "keeps its own architecture: max_position_embeddings not applied" in printed
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.classifier_pooling == "mean"
    before, after = load_file(pretrained / "model.safetensors"), load_file(folder / "model.safetensors")
    trunk = [name for name in before if name.startswith("model.")]
    assert len(trunk) > 10
    assert all(torch.equal(before[name], after[name]) for name in trunk)
    assert facts(folder)["model"]["base_model"] == str(pretrained)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(pretrained).get_vocab()


def run_bert(folder, bert, *argv):
    """BERT on the reviews, with a config of its own: the preset's architecture is not BERT's."""
    config = folder.with_suffix(".yaml")
    config.write_text(f"dataset: {REVIEWS}\nmodel: {bert}\noutput_dir: {folder}\ndisable_tqdm: true\n")
    finetune.main(["--config", str(config), *map(str, argv)])
    return folder


def test_the_gradient_does_not_depend_on_accumulation_though_bert_drops_the_count(bert, tmp_path, capsys):
    """transformers' BERT accepts num_items_in_batch and averages over the micro-batch all the same."""
    folders = []
    for rows, accumulation in ((8, 1), (2, 4)):
        sizes = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", accumulation]
        dropout = ["--model_type", "bert", "--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0"]
        steps = ["--max_steps", "4", "--logging_steps", "1", "--optim", "sgd", "--learning_rate", "0.1"]
        steps += ["--l1_penalty", "0.01"]  # once a step, too
        folders.append(run_bert(tmp_path / f"run{rows}", bert, *sizes, *dropout, *steps))
    printed = capsys.readouterr().out
    assert "NEWLY INITIALISED, to be learned from these data: classifier.bias, classifier.weight" in printed
    one, four = ([row for row in history(folder) if "loss" in row] for folder in folders)
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in four], rel=1e-5)
    assert [row["grad_norm"] for row in one] == pytest.approx([row["grad_norm"] for row in four], rel=1e-4)
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(folders[0]), BertForSequenceClassification)


@pytest.fixture(scope="module")
def undecided(tmp_path_factory, seed_argv):
    """A model that errs often: two steps of training."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        short = ["--max_steps", "12", "--learning_rate", "1e-3", *seed_argv]
        return run(tmp_path_factory.mktemp("undecided") / "run", *short)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def adapter(undecided, tmp_path_factory, seed_argv):
    """The folder of a LoRA run."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        return run(tmp_path_factory.mktemp("adapter") / "run", "--model", undecided, *LORA, *seed_argv)
    finally:
        os.chdir(before)


def test_an_adapter_trains_the_head_whole_for_a_task_that_peft_does_not_know(bert):
    model = BertForSequenceClassification.from_pretrained(bert)
    adapted = add_adapter(model, AdapterArguments(adapter="lora"), task_type=None)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    assert any("attention.self.query.lora_A" in name for name in trained)
    assert not any("classifier.lora" in name for name in trained)


@pytest.mark.trains
@pytest.mark.filterwarnings("error::FutureWarning")
def test_lora_learns_and_leaves_an_adapter(adapter, undecided, tmp_path):
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not names & {"config.json", "model.safetensors", "training_args.bin"}
    run_facts = facts(adapter)
    assert (run_facts["model"]["adapter"], run_facts["model"]["saved_as"]) == ("lora", "adapter")
    assert run_facts["metrics"]["test/loss"] < facts(undecided)["metrics"]["test/loss"] - 0.1
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["r"], settings["base_model_name_or_path"]) == (
        "SEQ_CLS",
        4,
        str(undecided),
    )
    saved = load_file(adapter / "adapter_model.safetensors")
    assert any(name.endswith("score.weight") for name in saved)
    assert any("self_attn.q_proj.lora_A" in name for name in saved)
    assert not any("score.lora" in name for name in saved)
    evaluate.main(["--model", str(adapter), "--output", str(tmp_path / "metrics.json")])
    again = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert again["test/loss"] == pytest.approx(run_facts["metrics"]["test/loss"], abs=1e-6)
    next_command = Objective.next_command(None, adapter)
    assert next_command == f"accelerate launch recipes/evaluate.py --model {adapter}"


def test_an_adapter_is_evaluated_with_the_pooling_it_was_trained_with(pretrained, tmp_path):
    folder = run(tmp_path / "run", "--model", pretrained, "--adapter", "lora", "--max_steps", "4")
    assert facts(folder)["config"]["classifier_pooling"] == "mean"  # the decoder's own is "last"
    evaluate.main(["--model", str(folder)])
    again = json.loads((folder / "metrics.json").read_text())["metrics"]["test/loss"]
    assert again == pytest.approx(facts(folder)["metrics"]["test/loss"], abs=1e-6)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_merged_adapter_of_bert_is_a_whole_model_with_the_same_predictions(bert, tmp_path):
    folder = run_bert(tmp_path / "run", bert, *LORA, "--merge_adapter", "--max_steps", "10")
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(folder), BertForSequenceClassification)
    evaluate.main(["--model", str(folder)])
    merged = json.loads((folder / "metrics.json").read_text())["metrics"]["test/loss"]
    assert merged == pytest.approx(facts(folder)["metrics"]["test/loss"], abs=1e-5)  # measured before the merge
    assert facts(folder)["model"]["saved_as"] == "model"


@pytest.mark.trains
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_evaluation_is_exact_over_all_rows_whatever_the_batch_size(undecided, batch_size, tmp_path, capsys):
    evaluate.main(["--model", str(undecided), "--batch_size", str(batch_size), "--output", str(tmp_path / "m.json")])
    metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
    rows = read_table([REVIEWS / "test.csv"])
    model = AutoModelForSequenceClassification.from_pretrained(undecided).eval()
    tokenizer = AutoTokenizer.from_pretrained(undecided)
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in rows["text"]])
    truth = torch.tensor([model.config.label2id[label] for label in rows["label"]])
    predicted = logits.argmax(-1)
    assert 0.3 < metrics["test/accuracy"] < 1, "a model that is always right would prove nothing"
    assert metrics["test/accuracy"] == pytest.approx((predicted == truth).float().mean().item(), abs=1e-6)
    assert metrics["test/macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"), abs=1e-9)
    assert metrics["test/loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), abs=1e-6)
    assert metrics == pytest.approx({k: v for k, v in facts(undecided)["metrics"].items() if "test" in k}, abs=1e-6)
    assert "negative " in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_evaluate_as_one(undecided, tmp_path):
    """40 rows in batches of 2 x 7: the last batches are filled up with rows that must not count twice."""
    argv = ["recipes/evaluate.py", "--model", undecided, "--batch_size", "7", "--output", tmp_path / "metrics.json"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *map(str, argv)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics == pytest.approx({k: v for k, v in facts(undecided)["metrics"].items() if "test" in k}, abs=1e-6)


def test_evaluation_on_other_rows_keeps_the_columns_of_the_run(undecided, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "the soup was warm", "label": 1}) + "\n")
    evaluate.main(
        ["--model", str(undecided), "--test_file", str(tmp_path / "other.jsonl"), "--output", str(tmp_path / "m")]
    )
    data = json.loads((tmp_path / "m").read_text())["data"]
    assert (data["name"], data["test"]["rows"]) == ("other", 1)


def test_a_classifier_for_other_labels_gets_a_new_head(finetuned, tmp_path, capsys):
    lines = [f"text {i},{'abc'[i % 3]}" for i in range(30)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    data = ["--dataset", tmp_path / "train.csv", "--model", finetuned, "--max_steps", "1"]
    folder = run(tmp_path / "run", *data)
    printed = capsys.readouterr().out
    assert "was trained for another number of labels: " in printed
    assert "score.bias was (2,), is (3,); score.weight was (2, 32), is (3, 32)" in printed
    assert "there are no validation rows: 3 of the 30 training rows are held out" in printed
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_gradient_that_is_not_finite_ends_the_run_and_leaves_no_model(tmp_path):
    with pytest.raises(ValueError, match="step 2: the gradient is not finite, so it was not applied"):
        run(tmp_path / "run", "--learning_rate", "1e38", "--warmup_steps", "0")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, capsys):
    run(tmp_path / "run", "--dry_run", "--batch_size", "32", "--micro_batch_size", "16")
    printed = capsys.readouterr().out
    for pattern in (
        r"parameters +301,250 \(301,250 trained\)",
        r"steps +60 \(6 epochs\)",
        r"estimated time +[\d.]+ (s|min) ",
    ):
        assert re.search(pattern, printed), pattern
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learing_rate", "1"], r"unknown key 'learing_rate'; did you mean 'learning_rate'\?"),
        (["--hub_token", "secret"], r"unknown key 'hub_token'"),
        (
            ["--text_column", "sentence"],
            r"text_column='sentence' is not in the train data; its columns are text, label",
        ),
        (["--dataset", "./nowhere"], r"dataset='nowhere' does not exist"),
        (["--model", "./nowhere"], r"no tokenizer can be loaded from '\./nowhere'"),
        (
            ["--model", "./nowhere", "--tokenizer", "byte_bpe"],
            r"model='\./nowhere' is no folder here, and as a Hub id",
        ),
        (["--model", str(REVIEWS), "--tokenizer", "byte_bpe"], r"is a folder without config\.json"),
        (["--adapter", "prefix"], r"adapter='prefix' is unknown; choose lora or dora"),
        (["--adapter", "lora"], r"adapter=lora changes a pretrained model; name one with model"),
        (
            ["--ema_decay", "1"],
            r"do not fit:\n  ema_decay=1\.0 is out of range; give a number of at least 0 and below 1",
        ),
        (
            ["--optimizer", "adam"],
            r"optimizer='adam' is unknown; choose one of adamw, muon, sgd, or use optim",
        ),
        (["--optimizer", "sgd", "--optim", "adafactor"], r"optimizer=sgd and optim=adafactor both name an optimizer"),
        (
            ["--optimizer", "sgd", "--sgd_momentum", "1"],
            r"sgd_momentum=1\.0 is out of range; give a number of at least",
        ),
        (
            ["--early_stopping_patience", "1", "--eval_strategy", "no"],
            r"early_stopping_patience=1 needs evaluations; set",
        ),
        (
            ["--metric_for_best_model", "macro_f2"],
            r"metric_for_best_model='macro_f2' is not measured; choose one of loss, accuracy, macro_f1, or leave it "
            r"out for accuracy$",
        ),
        (["--num_train_steps", "3", "--max_steps", "4"], r"num_train_steps=3 and max_steps=4 contradict each other"),
        (["--batch_size", "9", "--micro_batch_size", "2"], r"micro_batch_size=2 does not divide the 9 rows of an opt"),
        (["--merge_adapter"], r"merge_adapter needs an adapter: set adapter to lora"),
        (["--max_length", "65"], r"max_length=65 exceeds the model's limit of 64 tokens"),
        (["--num_attention_heads", "3"], r"hidden_size=32 is not a multiple of num_attention_heads=3"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(argv, message, tmp_path):
    with pytest.raises((ValueError, OSError, StrictDataclassError), match=message):
        run(tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()


WHOLE = ["--ema_decay=0.9", "--l1_penalty=0.1", "--optimizer=muon", "--unfreeze_epochs=0.5"]


@pytest.mark.parametrize("setting", WHOLE)
def test_what_needs_whole_weights_is_refused_where_devices_hold_parts(setting):
    args = finetune.read_arguments(["--preset", "smoke", setting])[2]
    check_whole_weights(args, is_sharded=False)
    with pytest.raises(
        ValueError, match=f"^{setting[2:]}: not under FSDP or DeepSpeed, .* leave out one or the other$"
    ):
        check_whole_weights(args, is_sharded=True)
    check_whole_weights(finetune.read_arguments(["--preset", "smoke"])[2], is_sharded=True)


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_run_sees_by_trainer_where_devices_hold_parts(kind, tmp_path, monkeypatch):
    """Trainer itself finds out only on GPUs, and with DeepSpeed installed."""
    make = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", lambda t: (make(t), setattr(t, kind, True)))
    with pytest.raises(
        ValueError, match=r"^ema_decay=0\.9, optimizer=sgd: not under FSDP or DeepSpeed, because whole"
    ):
        run(tmp_path / "run", "--ema_decay", "0.9", "--optimizer", "sgd")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.trains
def test_a_language_model_is_finetuned_evaluated_and_asked_by_the_same_recipes(pretrained, tmp_path, seed_argv):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 60)
    files = [f"--{split}_file={text}" for split in ("train", "validation", "test")]
    argv = ["--model", str(pretrained), *files, "--learning_rate", "3e-3", *seed_argv]
    settings = ["--context_length", "32", "--num_train_epochs", "4", "--disable_tqdm", "true"]
    config = tmp_path / "lm.yaml"
    config.write_text("task: causal_lm\nprompts: [To be]\nsample_tokens: 8\nleakage: allow\n")
    folder = tmp_path / "run"
    finetune.main(["--config", str(config), *argv, *settings, "--output_dir", str(folder)])
    metrics = facts(folder)["metrics"]
    before = json.loads((pretrained / "run.json").read_text())["metrics"]["validation/perplexity"]
    assert metrics["test/perplexity"] < before / 2
    evaluate.main(["--model", str(folder), "--batch_size", "3", "--output", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())["metrics"]
    assert again == pytest.approx({k: v for k, v in metrics.items() if k.startswith("test/")}, rel=1e-6)
    prompts = tmp_path / "prompts.csv"
    prompts.write_text('text\nTo be\n"or not to be, that"\n')
    predict.main(["--model", str(folder), "--input", str(prompts), "--output", str(tmp_path / "out.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["To be", "or not to be, that"]
    assert all(line["prediction"] for line in lines)
    for name, seed in {"same": [], "said": ["--seed", "42"], "other": ["--seed", "7"]}.items():
        output = str(tmp_path / f"{name}.jsonl")
        predict.main(["--model", str(folder), "--input", str(prompts), "--output", output, *seed])
    written = {name: (tmp_path / f"{name}.jsonl").read_bytes() for name in ("out", "same", "said", "other")}
    assert written["out"] == written["same"] == written["said"] != written["other"]


def test_what_would_leak_or_hide_something_is_settled(tmp_path, finetuned):
    args = finetune.read_arguments(["--preset", "smoke", "--output_dir", str(tmp_path)])[2]
    assert args.logging_nan_inf_filter is False
    assert (args.hub_token, args.push_to_hub) == (None, False)
    assert not [key for key in facts(finetuned)["config"] if key.startswith("hub_")]


def test_only_the_main_process_writes_the_history(tmp_path):
    for is_main in (False, True):
        recorder = callbacks.RecordHistory(tmp_path)
        state = TrainerState(is_world_process_zero=is_main, global_step=3)
        recorder.on_train_begin(None, state, None)
        recorder.on_log(None, state, None, logs={"eval_loss": 0.5, "eval_runtime": 1.0})
        recorder.on_log(None, state, None, logs={"loss": 0.25, "learning_rate": 0.1})
        assert (tmp_path / "history.jsonl").exists() == is_main
    assert [set(row) for row in history(tmp_path)] == [
        {"step", "validation/loss"},
        {"step", "loss", "learning_rate", "seconds"},
    ]


def test_folders_that_do_not_fit_are_refused(finetuned, adapter, bert):
    with pytest.raises(ValueError, match=r"it differs in\n  learning_rate: 0\.005 there, 0\.0001 now"):
        run(finetuned, *LONG, "--learning_rate", "1e-4")
    with pytest.raises(ValueError, match="holds an adapter, not a whole model; save one with merge_adapter"):
        run(finetuned, "--model", adapter)
    with pytest.raises(ValueError, match=r"was not trained for this task: NEWLY INITIALISED.* classifier\.bias"):
        evaluate.main(["--model", str(bert), "--test_file", str(REVIEWS / "test.csv")])
    with pytest.raises(ValueError, match="model is not set: name the folder or Hub id"):
        evaluate.main([])


def test_the_shipped_reviews_are_what_their_script_writes(tmp_path):
    script = runpy.run_path(str(REVIEWS / "make_reviews.py"))
    script["main"](tmp_path)
    for split in ("train", "validation", "test"):
        assert (tmp_path / f"{split}.csv").read_bytes() == (REVIEWS / f"{split}.csv").read_bytes()
    texts = [
        text for split in ("train", "validation", "test") for text in read_table([REVIEWS / f"{split}.csv"])["text"]
    ]
    assert len(set(texts)) == 400
