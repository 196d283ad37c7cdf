"""The search: it finds a minimum, goes on where it was killed, and runs a recipe as it says."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bmtk.arguments import read_yaml
from bmtk.search.space import read_space
from bmtk.search.study import explore, open_study, search_settings, summary
from bmtk.search.trial import RecipeTrials, TrialFailed
from bmtk.tasks import TASKS
from bmtk.tasks.causal_lm import CausalLMArguments
from bmtk.training.signals import Stopped, StopRequest
from recipes import finetune, pretrain

ROOT = Path(__file__).parents[2]
SPACE = read_space(["x=0..10", "rate=1e-4..1:log"], {"x": float, "rate": float}, {})
CUT = ["--num_train_steps", "4", "--eval_steps", "0", "--save_steps", "0", "--sample_tokens", "0"]

# A recipe in miniature: a loss of five evaluations that falls to x, or what else the settings say.
RECIPE = """
import json, pathlib, signal, sys, time
import yaml
settings = yaml.safe_load(open(sys.argv[2]))
folder = pathlib.Path(settings["output_dir"])
assert settings["skip_test"]
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "model.safetensors").write_text("weights")
if settings.get("fail"):
    sys.exit(f"error: {settings['fail']}")
if settings.get("stop"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (folder / "started").write_text("")
    time.sleep(20)
for step in range(1, 6):
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "validation/loss": settings["x"] + 5 - step}) + "\\n")
    if settings["x"] > settings.get("slow_above", 99) and step == 2:
        time.sleep(20)
(folder / "run.json").write_text(json.dumps({"metrics": {settings.get("measures", "validation/loss"): settings["x"]}}))
"""


def bowl(trial):
    """Lowest at x=3, rate=0.01."""
    return (trial.params["x"] - 3) ** 2 + (math.log10(trial.params["rate"]) + 2) ** 2


def explored(path, num_trials, run_trial=bowl, first=()):
    study, reported = open_study(path, maximise=False, first=dict(first)), []
    explore(study, SPACE, run_trial, num_trials=num_trials, seed=1, tell=reported.append)
    return study, reported


def test_the_minimum_of_a_bowl_is_found(tmp_path):
    study, reported = explored(tmp_path / "study.journal", 40)
    best = study.best_trial.params
    assert abs(best["x"] - 3) < 0.7
    assert 10**-2.7 < best["rate"] < 10**-1.3
    assert [trial.number for trial in reported] == list(range(40))
    tail = sum(bowl(trial) for trial in study.trials[20:]) / 20
    assert tail < 0.5 * sum(bowl(trial) for trial in study.trials[:10]) / 10  # it learns; random search does not
    assert "importance: " in summary(study, "loss")


def test_the_first_trial_has_the_values_of_the_config(tmp_path):
    study, _ = explored(tmp_path / "study.journal", 2, first={"x": 7.0, "rate": 0.5})
    assert study.trials[0].params == {"x": 7.0, "rate": 0.5}
    assert study.trials[1].params != study.trials[0].params


def test_a_killed_search_goes_on_as_if_nothing_had_been(tmp_path):
    whole, _ = explored(tmp_path / "whole.journal", 14)
    ran = []

    def killed_at_12(trial):
        ran.append(trial.number)
        if len(ran) == 13:
            raise KeyboardInterrupt
        return bowl(trial)

    with pytest.raises(KeyboardInterrupt):
        explored(tmp_path / "cut.journal", 14, killed_at_12)
    with (tmp_path / "cut.journal").open("a") as file:
        file.write('{"op_code": 6, "wor')  # a line that the kill cut short
    again, reported = explored(tmp_path / "cut.journal", 14, killed_at_12)
    assert ran == [*range(13), 12, 13]  # the interrupted one is run to its end, no other twice
    assert [trial.number for trial in reported] == [12, 13]
    assert [trial.params for trial in again.trials] == [trial.params for trial in whole.trials]
    assert explored(tmp_path / "cut.journal", 14, killed_at_12)[1] == []


def test_failed_trials_are_no_end_unless_none_succeeds(tmp_path):
    def fails_now_and_then(trial):
        if trial.number % 2 == 0:
            raise TrialFailed("out of memory")
        return bowl(trial)

    study, _ = explored(tmp_path / "a.journal", 6, fails_now_and_then)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE] * 3
    assert "6 trials, 3 failed" in summary(study, "loss")

    def fails(trial):
        raise TrialFailed("no such file")

    with pytest.raises(ValueError, match=r"none of 3 trials succeeded; the last one: no such file\. Fix that, "):
        explored(tmp_path / "b.journal", 6, fails)


# Trials as processes -------------------------------------------------------------------------------------------------


def trials(tmp_path, **settings):
    script = tmp_path / "recipe.py"
    script.write_text(RECIPE)
    return RecipeTrials(str(script), settings, tmp_path / "trials", "validation/loss", StopRequest())


def ask(tmp_path, **first):
    study = open_study(tmp_path / "study.journal", maximise=False, first=first)
    return study.ask(SPACE)


def test_a_trial_is_the_recipe_with_other_values(tmp_path):
    run = trials(tmp_path, x=1.0, task="t")
    assert run(ask(tmp_path, x=2.5, rate=0.1)) == 2.5
    folder = tmp_path / "trials" / "0000"
    written = {"x": 2.5, "task": "t", "rate": 0.1, "output_dir": str(folder), "skip_test": True}
    assert read_yaml(folder / "trial.yaml") == written
    run.clear(0, keep_model=True)
    assert sorted(path.name for path in folder.glob("*") if path.suffix == ".safetensors" or path.is_dir()) == [
        "model.safetensors"
    ]
    run.clear(0, keep_model=False)
    assert not (folder / "model.safetensors").exists()
    assert (folder / "run.json").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fail": "the loss is nan"}, r"^error: the loss is nan \(exit status 1; see .*log.txt\)"),
        ({"measures": "test/loss"}, "validation/loss was not measured, only test/loss"),
    ],
)
def test_a_trial_without_a_value_has_failed_and_says_why(tmp_path, settings, reason):
    with pytest.raises(TrialFailed, match=reason):
        trials(tmp_path, **settings)(ask(tmp_path))


def test_a_trial_in_other_hands_is_left_alone(tmp_path):
    lock = tmp_path / "trials" / "0000" / ".lock"
    lock.parent.mkdir(parents=True)
    code = (
        f"import fcntl, time\nfile = open({str(lock)!r}, 'a+')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="0000' is in use by another process"):
            trials(tmp_path)(ask(tmp_path))
        holder.kill()


def test_a_signal_is_passed_on_and_the_trial_is_gone_on_with(tmp_path):
    run = trials(tmp_path, stop=True)
    trial = ask(tmp_path, x=1.0, rate=0.1)
    run.request.signal_number = signal.SIGTERM
    started = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        run(trial)
    assert stopped.value.code == 143
    assert time.monotonic() - started < 15  # of the twenty that it would have taken
    assert trial.study.trials[0].state == TrialState.RUNNING  # and so the next search begins with it
    assert explored(tmp_path / "study.journal", 1, trials(tmp_path))[0].trials[0].value == 1.0


def test_a_trial_is_stopped_early_if_it_is_worse_than_the_median_at_the_same_evaluation(tmp_path):
    study = open_study(tmp_path / "study.journal", maximise=False, first={})
    run = trials(tmp_path, slow_above=5.0)
    for place in range(5):  # as many are let run before any is stopped
        done = study.ask(SPACE)
        for evaluation in range(1, 6):
            done.report(place / 10 + 5 - evaluation, evaluation)
        study.tell(done, place / 10)
    for x in (9.0, 0.1):
        study.enqueue_trial({"x": x, "rate": 0.1})
    started = time.monotonic()
    with pytest.raises(optuna.TrialPruned):
        run(study.ask(SPACE))
    assert time.monotonic() - started < 15
    study.tell(5, state=TrialState.PRUNED)
    assert run(study.ask(SPACE)) == 0.1


# The recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--search_space", "learing_rate=1..2"], "unknown key 'learing_rate'; did you mean 'learning_rate'"),
        (["--search_space", "seed=1,2"], "seed cannot be searched: it decides what is run or measured"),
        (["--search_space", "train_file=a,b"], "train_file cannot be searched"),
        (
            ["--model", "some/model", "--search_space", "hidden_size=8,16"],
            "it is an architecture field, and some/model",
        ),
        (["--dry_run"], "search, dry_run and find_lr exclude one another"),
        (["--search", "grid"], "search='grid' is unknown"),
    ],
)
@pytest.mark.parametrize("recipe", [pretrain, finetune], ids=lambda module: module.__name__)
def test_what_cannot_be_searched_is_reported_before_anything_runs(recipe, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        recipe.main(
            ["--preset", "smoke", "--output_dir", str(tmp_path / "s"), "--trials", "1", "--search", "optuna", *argv]
        )
    assert not (tmp_path / "s").exists()


TRANSLATION = "preview_rows preview_beams lower_case target_column"


@pytest.mark.parametrize(
    ("task", "argv", "refused", "allowed"),
    [
        ("causal_lm", "", "vocab_size tokenizer context_length eval_context_length sample_by", "sample_tokens"),
        ("causal_lm", "--metric_for_best_model eval_bits_per_byte", "context_length", "vocab_size tokenizer"),
        ("causal_lm", "--eval_context_length 64", "eval_context_length", "context_length"),
        ("masked_lm", "", "mlm_probability whole_word_masking context_length vocab_size", "hidden_dropout"),
        ("denoising", "", "noise_density mean_span_length context_length vocab_size", "hidden_dropout"),
        ("masked_image_modeling", "", "mask_ratio mask_cell_size image_size patch_size", "hidden_size"),
        ("masked_image_modeling", "--mask_cell_size 8", "mask_ratio image_size", "patch_size"),
        ("image_text_contrastive", "", "caption_column", "max_length vocab_size projection_dim"),
        ("object_detection", "", "objects_column", "image_size scale_jitter"),
        ("sequence_classification", "--problem_type regression", "label_column problem_type", "max_length vocab_size"),
        ("token_classification", "", "label_column", "max_length stride vocab_size"),
        ("question_answering", "", "answers_column scored_by", "max_length max_answer_length vocab_size"),
        ("translation", "", f"{TRANSLATION} bleu_tokenizer", "num_beams max_target_length vocab_size"),
        ("translation", "--metric_for_best_model loss", f"{TRANSLATION} vocab_size max_target_length", "num_beams"),
        ("speech_recognition", "", "text_case keep_punctuation", "token_unit hop_ms beam_width"),
        ("speech_recognition", "--metric_for_best_model loss", "text_case token_unit", "hop_ms"),
        ("time_series_forecasting", "--train_file a.csv", "prediction_length", "context_length season series_loss"),
        ("time_series_forecasting", "--validation_file a.csv", "prediction_length context_length", "season"),
        ("time_series_forecasting", "--metric_for_best_model mase", "season", "series_loss"),
        ("time_series_forecasting", "--metric_for_best_model loss", "series_loss", "season"),
    ],
)
def test_what_changes_the_measure_is_refused_and_nothing_else(task, argv, refused, allowed, tmp_path):
    (tmp_path / "settings.yaml").write_text(f"task: {task}\n", encoding="utf-8")
    space = [f"{name}=1,2" for name in (*refused.split(), *allowed.split(), "seed")]
    argv = ["--config", str(tmp_path / "settings.yaml"), "--search", "optuna", *argv.split(), "--search_space", *space]
    with pytest.raises(ValueError, match="search_space does not fit") as error:
        finetune.main(argv)
    found = [line.split()[0] for line in str(error.value).splitlines()[1:] if "cannot be searched: it " in line]
    assert found == [*refused.split(), "seed"]
    assert len(str(error.value).splitlines()) == len(found) + 1


def test_the_reason_is_given_and_what_would_help():
    reported = CausalLMArguments().settings_that_change("perplexity")
    assert reported["vocab_size"] == "decides what a token is, and perplexity is a mean over tokens"
    assert reported["context_length"].endswith("to go by where it is measured; set eval_context_length, and it may be")


def test_one_of_several_processes_does_not_search(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"one of 2 processes; launch it with one \(accelerate launch --num_p"):
        pretrain.main(["--preset", "smoke", "--output_dir", str(tmp_path), "--search", "optuna"])


# What it is called by is what its rows decide: the lower rate is the better one by an error, the higher by a share.
BY_RATE = """
import json, pathlib, sys
import yaml
settings = yaml.safe_load(open(sys.argv[2]))
metrics = {"validation/" + name: settings["learning_rate"] for name in ("METRIC", "loss")}
(pathlib.Path(settings["output_dir"]) / "run.json").write_text(json.dumps({"metrics": metrics}))
"""


@pytest.mark.parametrize(
    ("labels", "more", "metric", "best"),
    [
        ([0.5, 1.5, 2.0], [], "mse", 0.1),
        ([["a"], ["a", "b"], []], [], "micro_f1", 0.3),
        ([1, 2, 3], ["--problem_type", "regression"], "mse", 0.1),
        ([1, 2, 3], ["--metric_for_best_model", "eval_loss"], "loss", 0.1),
    ],
)
def test_a_search_goes_by_the_metric_that_its_rows_decide(tmp_path, labels, more, metric, best):
    (tmp_path / "recipe.py").write_text(BY_RATE.replace("METRIC", metric), encoding="utf-8")
    rows = [json.dumps({"text": f"text {place}", "label": label}) for place, label in enumerate(labels)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "validation.jsonl").write_text(rows[0].replace("text 0", "other"), encoding="utf-8")
    files = ["--train_file", f"{tmp_path}/train.jsonl", "--validation_file", f"{tmp_path}/validation.jsonl"]
    argv = ["--preset", "smoke", *files, "--output_dir", f"{tmp_path}/run", "--search", "optuna", "--trials", "4"]
    *settings, search, architecture = finetune.read_arguments(
        [*argv, "--search_space", "learning_rate=0.1,0.3", *more]
    )
    reported, settings = [], [*settings, architecture]
    search_settings(
        search, settings, TASKS["sequence_classification"], recipe=str(tmp_path / "recipe.py"), log=reported.append
    )
    assert {read_yaml(path)["learning_rate"] for path in (tmp_path / "run").rglob("trial.yaml")} == {0.1, 0.3}
    assert read_yaml(tmp_path / "run" / "best.yaml")["learning_rate"] == best
    assert f"trial {metric:>10}  values" in reported[-1]


def test_two_trials_of_a_recipe_and_what_they_leave(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = (ROOT / "recipes/data/tiny_shakespeare/validation.txt").read_text(encoding="utf-8")
    (tmp_path / "secret.txt").write_text(text[:5000], encoding="utf-8")
    (tmp_path / "seen.txt").write_text(text[5000:20000], encoding="utf-8")
    files = ["--train_file", str(tmp_path / "seen.txt"), "--validation_file", str(tmp_path / "seen.txt")]
    files += ["--test_file", str(tmp_path / "secret.txt"), "--data_name", "made up", "--leakage", "allow"]
    folder = tmp_path / "run"
    space = ["--search_space", "learning_rate=1e-6,3e-3", "hidden_dropout=0..0.2"]
    command = ["--preset", "smoke", *files, *CUT, "--output_dir", str(folder), "--search", "optuna", *space]
    pretrain.main([*command, "--trials", "2"])
    printed = capsys.readouterr().out
    assert "trial 1 (2 of 2): learning_rate" in printed
    assert f"next: accelerate launch recipes/pretrain.py --config {folder / 'best.yaml'}" in printed
    for number in (0, 1):
        facts = json.loads((folder / "trials" / f"000{number}" / "run.json").read_text())
        assert {name.split("/")[0] for name in facts["metrics"]} == {"validation"}
        assert "test" not in facts["data"]
    assert {path.name for path in (folder / "corpus").glob("[!.]*")} == {"tokenizer", "train", "validation"}
    best = read_yaml(folder / "best.yaml")
    trial = read_yaml(folder / "trials" / "0000" / "trial.yaml")
    assert best.pop("output_dir") == str(folder / "best")
    assert trial.keys() - best.keys() == {"skip_test", "output_dir", "corpus_dir"}
    assert best["learning_rate"] in (1e-6, 3e-3)
    assert best["num_train_steps"] == 4

    pretrain.main([*command, "--trials", "2"])  # nothing is left to do
    assert "resuming after 2 of them" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"(?s)holds another run; it differs in\s+search_space: .*hidden_dropout"):
        pretrain.main([*command[:-1], "--trials", "2"])

    with_best = [*command[: command.index("--search")], "--learning_rate", str(best["learning_rate"])]
    by_file, by_hand = map(pretrain.read_arguments, (["--config", str(folder / "best.yaml")], with_best))
    by_hand[2].output_dir = by_file[2].output_dir
    assert by_file[1:3] == by_hand[1:3]
