"""The flat YAML, the command line over it, and what a typo says."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

import bmtk  # noqa: F401
from bmtk.arguments import (
    RunArguments,
    RunConfig,
    changed_settings,
    clean_errors,
    model_fields,
    model_type_of,
    read_yaml,
    resolved_config,
)


@dataclass
class Training:
    learning_rate: float = 1e-3
    num_steps: int = 10
    with_ema: bool = True
    files: list[str] = field(default_factory=list)


def bind(file_values, argv, classes=(Training,)):
    return RunConfig(file_values, argv).bind(list(classes), description="test")


def test_the_dataclass_decides_the_type_whatever_yaml_thinks(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nnum_steps: 7\nwith_ema: false\nfiles: [a.txt, b.txt]\n")
    assert read_yaml(path)["learning_rate"] == "1e-3"  # YAML 1.1 reads a string
    (training,) = bind(read_yaml(path), [])
    assert training == Training(learning_rate=0.001, num_steps=7, with_ema=False, files=["a.txt", "b.txt"])


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


def test_all_unknown_keys_are_told_at_once():
    with pytest.raises(ValueError, match=r"'nmu_steps'.*\n.*'zebra'; see --help"):
        bind({"nmu_steps": 1, "zebra": 2}, [])


def test_a_value_of_the_wrong_type_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        bind({"num_steps": "many"}, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: argument --num_steps/--num-steps: invalid int value: 'many'\n"


def test_own_data_have_neither_the_sources_nor_the_labels_of_a_file_that_nobody_asked_for(tmp_path):
    (tmp_path / "task").mkdir()
    path = tmp_path / "task" / "first.yaml"
    path.write_text("{dataset: theirs, data_name: Theirs, label_names: [bad, good], text_column: said, num_steps: 1}")

    def read(*argv):
        return RunConfig.read(["--dataset", "mine", *argv], configs=tmp_path, default="task/first").file_values

    assert read() == {"num_steps": 1}
    asked_for = {"label_names": ["bad", "good"], "text_column": "said", "num_steps": 1}
    assert read("--config", str(path)) == read("--preset", "first") == asked_for


def test_an_unknown_key_is_told_with_the_file_that_holds_it():
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
    (tmp_path / "other" / "first.yaml").write_text("num_steps: 4")  # of a model that nobody asked for
    assert read("--task", "other") is None
    assert (read("--task", "other", "--preset", "first"), read("--task", "causal_lm")) == (4, 1)
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


def test_architecture_fields_come_from_the_config_class_with_its_comments_as_help():
    fields = model_fields("bm_transformer")
    (architecture,) = bind({"hidden_size": 32, "norm_eps": "1e-6", "hidden_act": "relu2"}, [], [fields])
    assert (architecture.hidden_size, architecture.norm_eps, architecture.hidden_act) == (32, 1e-6, "relu2")
    assert architecture.num_hidden_layers is None  # the class's own default
    assert not {"vocab_size", "use_cache", "pad_token_id"} & vars(architecture).keys()
    assert fields.__dataclass_fields__["hidden_size"].metadata["help"] == "width of a position [256]"


def test_an_unknown_model_type_names_ours_and_what_is_near():
    with pytest.raises(
        ValueError, match=r"model_type='bm_transfromer' is unknown; ours are bm_.*near: bm_transformer"
    ):
        model_fields("bm_transfromer")


def test_a_preset_says_which_family_a_new_model_is_of():
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


def test_a_users_error_is_one_line_and_status_1(capsys, monkeypatch):
    monkeypatch.delenv("BMTK_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped, clean_errors():
        raise ValueError("batch_size=0 is out of range")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("\nerror: batch_size=0 is out of range\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(TypeError, match="a bug"), clean_errors():
        raise TypeError("a bug")


def test_changed_settings_leave_out_defaults_and_write_a_dictionary_as_the_text_it_is_read_from():
    @dataclass
    class WithDictionary:
        options: dict | None = None

    assert changed_settings(Training(num_steps=3), WithDictionary({"a": 1})) == {"num_steps": 3, "options": '{"a": 1}'}
    assert changed_settings(Training(), WithDictionary()) == {}
