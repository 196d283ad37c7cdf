"""The flat YAML file, the command line over it, --help, and errors."""

import dataclasses
import importlib
import inspect
import os
import re
import shlex
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import StrictDataclassError

import bmtk  # noqa: F401
from bmtk.arguments import (
    RunArguments,
    RunConfig,
    changed_settings,
    chosen_fields,
    default_keys,
    field_help,
    model_fields,
    model_type_of,
    read_yaml,
    resolved_config,
)
from bmtk.errors import UserError
from bmtk.models import FAMILIES
from bmtk.option_help import help_topic
from bmtk.process import clean_errors
from bmtk.tasks.objective import python_command
from bmtk.training.arguments import AUTO, LoopArguments
from bmtk.training.finetuning_arguments import FineTuningArguments


@dataclass
class Training:
    learning_rate: float = 1e-3
    num_steps: int = 10
    with_ema: bool = True
    files: list[str] = field(default_factory=list)


@dataclass
class Width:
    hidden_size: int = 8


def bind(file_values, argv, classes=(Training,)):
    return RunConfig(file_values, argv).bind(list(classes), description="test")


def test_the_dataclass_decides_the_type_whatever_yaml_thinks(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nnum_steps: 7\nwith_ema: false\nfiles: [a.txt, b.txt]\n")
    assert read_yaml(path)["learning_rate"] == "1e-3"  # YAML 1.1 reads a string
    (training,) = bind(read_yaml(path), [])
    assert training == Training(learning_rate=0.001, num_steps=7, with_ema=False, files=["a.txt", "b.txt"])


@pytest.mark.parametrize(
    ("file_values", "argv"),
    [
        ({"micro_batch_size": "auto"}, []),
        ({"micro_batch_size": 4}, ["--micro_batch_size", "auto"]),
        ({}, ["--seed=1", "--micro_batch_size=auto"]),
        ({}, ["--micro-batch-size", "auto", "--seed", "1"]),
    ],
)
def test_the_word_auto_is_a_size_of_micro_batches(file_values, argv):
    (args,) = bind(file_values, argv, [LoopArguments])
    assert args.micro_batch_size == AUTO
    assert args.batching["micro_batch_size"] == 0
    recorded = resolved_config(args)
    assert recorded["micro_batch_size"] == "auto"
    assert bind(recorded, [], [LoopArguments]) == [args]
    with pytest.raises(UserError, match="micro_batch_size=-2 is out of range; give a number of at least 0"):
        LoopArguments(micro_batch_size=-2)


@pytest.mark.parametrize("argv", [["--num_steps", "3"], ["--num-steps=3"], ["--num_steps=3"]])
def test_the_command_line_wins_over_the_file(argv):
    (training,) = bind({"num_steps": 7, "learning_rate": "2e-4"}, argv)
    assert (training.num_steps, training.learning_rate) == (3, 2e-4)


@pytest.mark.parametrize(
    ("file_values", "argv"), [({"learing_rate": 1}, []), ({}, ["--learing_rate", "1"]), ({}, ["--learing-rate=1"])]
)
def test_an_unknown_key_names_the_nearest_known_one(file_values, argv):
    with pytest.raises(ValueError, match=r"unknown key 'learing_rate'; did you mean 'learning_rate'\?"):
        bind(file_values, argv)


def test_all_unknown_keys_are_in_one_message():
    with pytest.raises(ValueError, match=r"'nmu_steps'.*\n.*'zebra'; see --help"):
        bind({"nmu_steps": 1, "zebra": 2}, [])


def test_a_value_of_the_wrong_type_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        bind({"num_steps": "many"}, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: argument --num_steps/--num-steps: invalid int value: 'many'\n"


def test_own_data_replace_what_a_file_says_of_its_own(tmp_path):
    (tmp_path / "task").mkdir()
    path = tmp_path / "task" / "first.yaml"
    path.write_text(
        "{dataset: theirs, data_name: Theirs, label_names: [bad, good], text_column: sentence, num_steps: 1}"
    )
    facts = ("data_name", "label_names", "text_column", "class_weights")

    def read(*argv):
        values = RunConfig.read(argv, configs=tmp_path, default="task/first")
        return values.drop_facts_of_other_data(facts), values.remarks, values.file_values

    for which in ([], ["--config", str(path)], ["--preset", "first"]):
        columns, remarks, left = read(*which, "--dataset", "mine")
        assert remarks == [f"{path} is about other data; not used of it: label_names"]
        assert columns == ["text_column"]
        assert left == {"text_column": "sentence", "num_steps": 1}
    assert read("--num_steps", "2") == ([], [], read_yaml(path))  # the data are those of the file
    path.write_text("{label_names: [bad, good]}")
    assert read("--dataset", "mine") == ([], [], {"label_names": ["bad", "good"]})  # the file is about any data


def test_the_default_file_is_that_of_the_family_that_is_named(tmp_path):
    (tmp_path / "task").mkdir()
    for name in ("first", "first_rnn", "first_transformer"):
        (tmp_path / "task" / f"{name}.yaml").write_text("num_steps: 1")

    def file_of(*argv):
        path = RunConfig.read(argv, configs=tmp_path, default="task/first").path
        return path and path.stem

    assert file_of("--model_type", "bm_rnn") == "first_rnn"
    assert file_of("--model_type", "bm_transformer") == file_of("--model_type", "bm_cnn") == file_of() == "first"
    assert file_of("--model_type", "bm_rnn", "--preset", "first") == "first"  # named
    assert file_of("--model_type", "bm_rnn", "--task", "another") is None


@pytest.mark.parametrize("named", [[], ["--preset", "first"]])
def test_the_default_file_may_be_about_another_model_and_one_that_is_named_may_not(tmp_path, named):
    (tmp_path / "task").mkdir()
    path = tmp_path / "task" / "first.yaml"
    path.write_text("{num_steps: 3, qk_norm: true, num_heads: 2}")
    argv = [*named, "--model_type", "llama"]
    values = RunConfig.read(argv, configs=tmp_path, default="task/first")
    if named:
        with pytest.raises(UserError, match=r"first.yaml: unknown key 'qk_norm'"):
            values.bind([RunArguments, Training], description="")
    else:
        with pytest.raises(UserError, match="unknown key 'qk_norm'"):  # of a model that has not even its width
            values.bind([RunArguments, Training], description="")
        assert values.bind([RunArguments, Training, Width], description="")[1].num_steps == 3
        assert values.remarks == [f"{path} is about another model; not used of it: qk_norm, num_heads"]
    own = RunConfig.read(named, configs=tmp_path, default="task/first")
    with pytest.raises(UserError, match="unknown key 'qk_norm'"):
        own.bind([RunArguments, Training], description="")  # of the family that it is about


@pytest.mark.parametrize("argv", [["--size", "null"], ["--size=null"]])
def test_a_key_of_the_file_is_unset_on_the_command_line(argv):
    values = RunConfig({"size": 3, "steps": 2}, ["--steps", "4", *argv, "--flag"])
    assert (values.file_values, values.argv) == ({"steps": 2}, ["--steps", "4", "--flag"])
    assert values.get("size") is None


def test_an_error_names_the_file_that_has_set_the_value(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("BMTK_DEBUG", raising=False)
    values = RunConfig({"task": "x"}, [], tmp_path / "mine.yaml")
    values.bind([RunArguments], description="")
    with pytest.raises(SystemExit), clean_errors():
        raise UserError("task='x' is unknown")
    assert f"\n  (task is set by {tmp_path / 'mine.yaml'})" in capsys.readouterr().err
    RunConfig({"task": "x"}, ["--task", "y"], tmp_path / "mine.yaml").bind([RunArguments], description="")
    with pytest.raises(SystemExit), clean_errors():
        raise UserError("task='y' is unknown")
    assert "is set by" not in capsys.readouterr().err


def test_the_home_folder_is_found_in_files_and_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = RunConfig({"model": "~/x", "train_file": ["~/a", "b~/c"]}, ["--output_dir=~/out", "--note", "a ~/ b"])
    assert values.file_values == {"model": "/home/me/x", "train_file": ["/home/me/a", "b~/c"]}
    assert values.argv == ["--output_dir=/home/me/out", "--note", "a ~/ b"]
    assert values.get("output_dir") == "/home/me/out"


def test_a_service_that_reports_are_sent_to_is_checked_with_the_arguments():
    with pytest.raises(
        UserError, match=r"report_to=tensorboard: .*\(pip install tensorboard, or leave report_to out\)"
    ):
        FineTuningArguments(output_dir="x", report_to=["tensorboard"])


@pytest.mark.parametrize("source", ["print('a')", 'print("it\'s")', "print('$HOME `x`')", "print('a\\n')"])
def test_a_line_of_python_is_quoted_for_the_shell(source):
    assert shlex.split(python_command(source)) == ["python", "-c", source]


def test_a_config_file_may_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("steps: 3"))
    writer.start()
    assert read_yaml(tmp_path / "pipe") == {"steps": 3}
    writer.join()


def test_an_unknown_key_is_named_with_its_file():
    config = RunConfig({"learing_rate": 1}, ["--num_step", "3"], Path("my.yaml"))
    with pytest.raises(
        ValueError, match=r"my\.yaml: unknown key 'learing_rate'.*\nunknown key 'num_step'; did you mean"
    ):
        config.bind([Training], description="test")


def test_a_negated_flag_is_known():
    (training,) = bind({}, ["--no_with_ema"])
    assert training.with_ema is False


def test_config_preset_and_default_choose_the_file(tmp_path):
    (tmp_path / "causal_lm").mkdir()
    (tmp_path / "causal_lm" / "first.yaml").write_text("num_steps: 1")
    (tmp_path / "causal_lm" / "smoke.yaml").write_text("num_steps: 2")
    (tmp_path / "mine.yaml").write_text("num_steps: 3")

    def read(*argv):
        return RunConfig.read(list(argv), configs=tmp_path, default="causal_lm/first").get("num_steps")

    assert read() == 1
    assert read("--preset", "smoke") == 2
    assert read("--config", str(tmp_path / "mine.yaml")) == 3
    assert read("--num_steps", "9") == "9"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "first.yaml").write_text("num_steps: 4")  # of another task than the default file's
    assert read("--task", "other") is None
    assert (read("--task", "other", "--preset", "first"), read("--task", "causal_lm")) == (4, 1)
    (tmp_path / "causal_lm" / ".git").mkdir()
    with pytest.raises(FileNotFoundError, match=r"smok\.yaml does not exist; .* holds first, smoke"):
        read("--preset", "smok")


@pytest.mark.parametrize(
    ("text", "message"), [("a: {b: 1}", "must be flat"), ("- a", "must be flat"), ("a: [1", "is not YAML")]
)
def test_a_file_that_is_no_flat_mapping_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "x.yaml")


def test_yaml_never_runs_code(tmp_path):
    (tmp_path / "x.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    with pytest.raises(ValueError, match="is not YAML"):
        read_yaml(tmp_path / "x.yaml")
    assert not (tmp_path / "made").exists()


def test_architecture_fields_come_from_the_config_class_with_its_help():
    fields = model_fields("bm_transformer")
    (architecture,) = bind({"hidden_size": 32, "norm_eps": "1e-6", "hidden_act": "relu2"}, [], [fields])
    assert (architecture.hidden_size, architecture.norm_eps, architecture.hidden_act) == (32, 1e-6, "relu2")
    assert architecture.num_hidden_layers is None  # the class's own default
    assert not {"vocab_size", "use_cache", "pad_token_id"} & vars(architecture).keys()
    assert fields.__dataclass_fields__["hidden_size"].metadata["help"] == "width of a position (default: 256)"


@pytest.mark.parametrize("config_class", FAMILIES, ids=lambda cls: cls.model_type)
def test_every_architecture_field_has_help_that_ends_in_its_default(config_class):
    names = [f.name for f in dataclasses.fields(config_class) if f.name in inspect.get_annotations(config_class)]
    assert len(names) > 30
    metadata = {f.name: f.metadata for f in dataclasses.fields(config_class)}
    for name in names:
        text = metadata[name]["help"]
        assert 10 < len(text) <= 140
        assert re.match(r"[a-z0-9]|RMS|LayerNorm", text), f"{name}: {text}"
        assert "default: " in (text if getattr(config_class, name) is None else field_help(config_class, name)), name


def test_the_fields_of_a_foreign_configuration_have_a_help_line_with_their_default():
    fields = model_fields("bert").__dataclass_fields__
    assert fields["hidden_size"].metadata["help"] == "field of transformers' BertConfig (default: 768)"
    assert fields["classifier_dropout"].metadata["help"] == "field of transformers' BertConfig (default: none)"


@pytest.mark.parametrize("config_class", FAMILIES, ids=lambda cls: cls.model_type)
def test_fields_with_help_are_still_checked_and_saved(config_class, tmp_path):
    with pytest.raises(StrictDataclassError, match="Field 'hidden_size' expected"):
        config_class(hidden_size="wide")
    config = config_class(classifier_dropout=0.25)
    config.save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_an_unknown_model_type_names_ours_and_what_is_near():
    with pytest.raises(
        ValueError, match=r"model_type='bm_transfromer' is unknown; ours are bm_.*near: bm_transformer"
    ):
        model_fields("bm_transfromer")


def test_the_text_of_a_dictionary_must_be_json():
    architecture = model_fields("bm_transformer")(rope_parameters='{"rope_type": linear}')
    with pytest.raises(UserError, match=r'rope_parameters=\{"rope_type": linear\} is not valid JSON: Expecting value'):
        chosen_fields(architecture)


def test_a_preset_decides_the_family_of_a_new_model():
    def of(**values):
        return model_type_of(RunConfig(values, []))

    assert (of(preset_model="resnet-18"), of(preset_model="awd-lstm-ptb")) == ("bm_cnn", "bm_rnn")
    assert (of(), of(model_type="gpt2")) == ("bm_transformer", "gpt2")
    with pytest.raises(ValueError, match=r"preset_model='resnet-19' is unknown; there are bm_cnn: alexnet, .*bm_r"):
        of(preset_model="resnet-19")
    with pytest.raises(ValueError, match="preset_model=resnet-18 is a bm_cnn, and model_type=bm_rnn; leave it"):
        of(preset_model="resnet-18", model_type="bm_rnn")


def test_a_name_of_two_groups_belongs_to_the_first():
    run, training = bind({"model": "x", "num_steps": 4}, [], [RunArguments, Training])
    assert (run.model, training.num_steps) == ("x", 4)


def test_the_resolved_config_reads_back_as_the_same_run():
    (training,) = bind({"learning_rate": "3e-4", "files": ["a"]}, [])
    assert bind(resolved_config(training), []) == [training]


# --help -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def help_of(capsys, monkeypatch):
    """What `--help ...` of a recipe prints, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "119")

    def shown(recipe, *argv):
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(f"recipes.{recipe}").read_arguments(["--help", *argv])
        assert not stopped.value.code
        return capsys.readouterr().out

    return shown


def help_by_option(text):
    """Option -> its help text, of a screen of options."""
    parts = re.split(r"^  --(\w+)", text.split("\n\n--help all")[0], flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (" ".join(part.split()) for part in parts[1::2]), strict=True))


@pytest.mark.parametrize("recipe", ["pretrain", "finetune", "evaluate", "predict"])
def test_the_first_screen_shows_the_options_that_people_change(recipe, help_of):
    text = help_of(recipe)
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 119
    options = help_by_option(text)
    wanted = {
        "model",
        "task",
        *(("learning_rate", "push_to_hub") if recipe in ("pretrain", "finetune") else ("output",)),
    }
    assert wanted <= options.keys()
    assert len(options) <= 26
    assert [name for name, help in options.items() if "default: " not in help] == []
    assert text.splitlines()[-2].startswith("--help all shows all ")
    assert text.splitlines()[-1].startswith("--help GROUP shows one group: ")


def test_settings_that_were_not_changed_have_their_defaults():
    args = LoopArguments(output_dir="x", learning_rate=0.5, sgd_momentum=0.9)
    keys = default_keys(args)
    assert {"sgd_momentum", "muon_momentum"} <= keys
    assert not {"output_dir", "learning_rate"} & keys


def test_help_is_shown_for_another_model_type_than_the_default_configs(help_of):
    assert "--hidden_dropout_prob NUMBER" in help_of("finetune", "architecture", "--model_type", "bert")


def test_help_all_has_every_option_and_the_choices_of_names(help_of):
    from recipes import finetune

    options = help_by_option(help_of("finetune", "all"))
    instances = finetune.read_arguments(["--preset", "smoke"])
    assert {f.name for instance in instances for f in dataclasses.fields(instance) if f.init} <= options.keys()
    assert "[rms_norm|layer_norm]" in options["norm_type"]
    assert [name for name, help in options.items() if "default: " not in help and not name.startswith("no_")] == []


def test_help_with_a_group_shows_that_group_alone(help_of):
    text = help_of("finetune", "data")
    assert text.startswith("data of sequence_classification:\n")
    options = help_by_option(text)
    assert {"dataset", "text_column"} <= options.keys()
    assert not {"learning_rate", "hidden_size", "adapter"} & options.keys()


def test_a_default_of_blanks_is_seen(help_of):
    assert (
        "(default: ' ')"
        in help_by_option(help_of("finetune", "data", "--task", "token_classification"))["word_separator"]
    )


def test_the_fields_that_two_groups_share_stay_in_their_groups(help_of):
    assert "--help GROUP shows one group: run, data, training, adapter, search, architecture.\n" in help_of("finetune")


def test_help_with_an_unknown_group_names_the_groups():
    from recipes import pretrain

    message = (
        "--help archi: there is no such group; did you mean 'architecture'\\?; choose all, run, data, training, s"
    )
    with pytest.raises(UserError, match=message):
        pretrain.read_arguments(["--help", "archi"])


@pytest.mark.parametrize(
    ("argv", "topic"),
    [
        (["--help"], ""),
        (["-h", "--seed", "1"], ""),
        (["--seed", "1", "--help", "data"], "data"),
        (["--help=all"], "all"),
        (["--seed"], None),
    ],
)
def test_the_topic_of_help_is_the_word_after_it(argv, topic):
    assert help_topic(argv) == topic


# Errors -------------------------------------------------------------------------------------------------------------


def test_a_forecast_of_no_steps_is_refused():
    with pytest.raises(UserError, match=r"^prediction_length=0 must be at least 1$"):
        chosen_fields(SimpleNamespace(hidden_size=8, context_length=None, prediction_length=0))


def test_changed_settings_leave_out_defaults_and_write_a_dictionary_as_the_text_it_is_read_from():
    @dataclass
    class WithDictionary:
        options: dict | None = None

    assert changed_settings(Training(num_steps=3), WithDictionary({"a": 1})) == {"num_steps": 3, "options": '{"a": 1}'}
    assert changed_settings(Training(), WithDictionary()) == {}
