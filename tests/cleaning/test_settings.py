"""The settings of a cleaning, which are read without the packages that do the work."""

import dataclasses
from pathlib import Path

import pytest

import bmtk_cli
from bmtk.cleaning import command
from bmtk.cleaning.arguments import CLASSES, RULE_SETTINGS, RULES
from bmtk.cleaning.command import clean, read_settings
from bmtk.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs" / "cleaning").glob("*.yaml"))


def settings(*argv):
    return read_settings(list(argv), ROOT / "recipes")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_binds_and_the_command_in_its_header_runs_it(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    command_line, *facts = config.read_text(encoding="utf-8").splitlines()[0].split("  |  ")
    words = command_line.removeprefix("# bmtk clean ").split()
    assert settings(*words) == settings("--config", str(config.relative_to(ROOT)))
    assert len(facts) == 2, "the header says the hardware, the time, and what to expect"


def test_the_shipped_data_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bound = settings("--config", str(CONFIGS[0]))
    assert bound.run.input == [str(ROOT / f"recipes/data/web_text/pages-{n}.jsonl.gz") for n in (1, 2)]
    assert bound.of_rule["decontaminate"].evaluation_sets == [f"quiz={ROOT}/recipes/data/web_text/quiz.jsonl#question"]


def test_every_setting_has_help_and_is_shown(capsys):
    for part in CLASSES:
        for field in dataclasses.fields(part):
            assert field.metadata["help"]
    with pytest.raises(SystemExit) as end:
        settings("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert [f.name for part in CLASSES for f in dataclasses.fields(part) if f"--{f.name}" not in shown] == []


def test_settings_of_rules_are_named_after_rules_that_there_are():
    assert set(RULE_SETTINGS) <= set(RULES)


def test_an_unknown_key_of_a_config_is_refused_by_name(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("input: [a.jsonl]\nrule: [length]\n")
    with pytest.raises(UserError, match=r"mine\.yaml: unknown key 'rule'; did you mean 'rules'\?"):
        settings("--config", str(config))


def test_rules_are_applied_in_one_order_whatever_that_of_the_config():
    assert settings("--input", "a.txt", "--rules", "near", "unicode", "exact").rules == ["unicode", "exact", "near"]


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name != "ftfy" else object())
    bound = settings("--input", "a.txt", "--rules", "length", "--output_dir", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"needs datatrove, py3langid: pip install 'big-model-toolkit\[clean\]'"):
        clean(bound, print)
    assert not (tmp_path / "out").exists()


def test_the_command_shows_an_error_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        bmtk_cli.main(["clean", "--input", "a.txt", "--rules", "lenght"])
    assert end.value.code == 1
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[0].startswith("error: rules: 'lenght' is unknown; did you mean 'length'? choose from unicode,")
